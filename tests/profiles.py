"""Profiles made up without any model, for tests of what reads profiles."""

from __future__ import annotations

from collections.abc import Mapping

from recompile.costs import Candidate, Measurement, Profile, ProfileGroup, ProfileHeader, group_name, layer_index

DIRECTORIES = {2: "./2bpw", 3: "./3bpw", 4: "./4bpw", 6: "out/6bpw"}
PROJECTIONS = {
    **{f"self_attn.{name}_proj": 4096 for name in "qkvo"},
    **{f"mlp.{name}_proj": 8192 for name in ("gate", "up", "down")},
}


def make_profile(
    level: str = "fused",
    layers: int = 3,
    seed: int = 0,
    rows: int = 4,
    directories: Mapping[object, str] = DIRECTORIES,
    context: str = "clean",
    experts: int = 0,
) -> Profile:
    """Costs fall by about 4 a bit, differ by layer and projection, and are noisy enough to be non-monotone at times."""
    ids = list(directories)
    candidates = tuple(Candidate(n, where, f"print-{n}") for n, where in directories.items())
    labels = [candidate.label for candidate in candidates]
    base = labels[1]
    projections = dict(PROJECTIONS)
    for number in range(experts):  # of every layer, beside its mlp
        projections |= {f"mlp.experts.{number}.{name}_proj": 1024 for name in ("gate", "up", "down")}
    members: dict[str, list[tuple[str, int]]] = {}
    for layer in range(layers):
        for name, weights in projections.items():
            module = f"model.layers.{layer}.{name}"
            members.setdefault(group_name(module, level), []).append((module, weights))
    groups = []
    rates = {
        label: n if isinstance(n, int) and not isinstance(n, bool) else 5 for label, n in zip(labels, ids, strict=True)
    }
    for name, found in members.items():
        weights = sum(size for _, size in found)
        bits = {label: weights * rates[label] + 128 * len(found) for label in labels}
        groups.append(ProfileGroup(name, tuple(m for m, _ in found), weights, bits, layer_index(found[0][0])))
    state = seed * 2654435761 % 2**32 + 1

    def noise() -> float:
        nonlocal state
        state = (1103515245 * state + 12345) % 2**31
        return state / 2**31

    control = tuple(0.0 if context == "clean" else 0.05 + 0.01 * noise() for _ in range(rows))
    measurements = {}
    for group in groups:
        worst = 0.2 * noise() ** 2
        for label in labels:
            if context == "base" and label == base:
                continue
            kl = worst * 4.0 ** (2 - rates[label])
            values = tuple(zero + kl * (0.8 + 0.4 * noise()) for zero in control)
            measurements[group.name, label] = Measurement(group.name, label, values)
    header = ProfileHeader(
        method="exact",
        context=context,
        level=level,
        reference="base",
        reference_fingerprint="print-base",
        base=base,
        candidates=candidates,
        groups=tuple(groups),
        fixed_bits=3 * 1000,
        fixed_weights=1000,
        other_bits=16 * 5000,
        other_weights=5000,
        rows=rows,
        row_tokens=16,
        rows_sha256="r0w5",
        rows_source="tests",
        dtype="float32",
        device="cpu",
    )
    return Profile(header, Measurement(None, None, control), measurements)
