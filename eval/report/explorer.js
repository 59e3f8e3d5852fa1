/* The page: what a person does, what the solver answers, and how it is shown. The state is the budget and the pins and
   bans; all else follows from it. */
"use strict";

const RecompileReport = (() => {
  const { Grid, axis, decode, draw, fillTable, gradient, inflate, layout, logAxis, make, plain, shade, theme } = RecompileCharts;
  const UNITS = {
    bpw: { name: "bits per weight", short: "bpw" },
    gib: { name: "file size", short: "GiB" },
    kl: { name: "largest KL", short: "nats/token" },
  };
  const ACTIONS = { cycle: "cycles", pin: "pins", ban: "bans", free: "frees" };
  const YAML_LINES_SHOWN = 400;
  const $ = (id) => document.getElementById(id);
  const view = {}; // what is loaded once: data, problem, groups, grids
  const state = { unit: "bpw", value: 0, pinned: null, banned: null };
  const now = {}; // what the last solve found
  const past = [];
  const future = [];

  /* ---- figures in words ---- */

  const digits = (value, count) => value.toLocaleString("en-US", { minimumFractionDigits: count, maximumFractionDigits: count, useGrouping: false });

  function klText(value) {
    if (value === null || value === undefined || !Number.isFinite(value)) return "–";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size < 1e-5) return value.toExponential(1).replaceAll("-", "−");
    return digits(value, Math.min(6, Math.max(3, 2 - Math.floor(Math.log10(size))))).replace("-", "−");
  }

  function withError(value, error) {
    return Number.isFinite(error) && error !== null ? `${klText(value)} ± ${klText(error)}` : klText(value);
  }

  function sizeText(bytes) {
    if (bytes < 2 ** 20) return `${digits(bytes / 1024, 1)} KiB`;
    return bytes < 2 ** 30 ? `${digits(bytes / 2 ** 20, 1)} MiB` : `${digits(bytes / 2 ** 30, 2)} GiB`;
  }

  const bytesOf = (bits) => Math.floor((bits + view.data.header.other_bits) / 8);
  const bpwOf = (bits) => bits / Math.max(1, view.data.header.counted_weights);
  const nameOf = (candidate) => view.data.candidates[candidate].label;
  const short = (text, limit = 90) => (text.length > limit ? `${text.slice(0, limit - 1)}…` : text);

  /* ---- loading ---- */

  async function start() {
    performance.mark("report-start");
    if (typeof DecompressionStream === "undefined") {
      showProblem("This browser cannot unpack the page's numbers; one from 2023 or later can.");
      return;
    }
    view.data = JSON.parse(await inflate("data"));
    prepare(view.data);
    setTheme(null);
    words();
    controls();
    buildMaps();
    measuredTable();
    solve();
    remember.last = snapshot();
    performance.mark("report-ready");
    document.documentElement.dataset.ready = "page";
    setTimeout(drawCharts, 30); // after the first screen is there
  }

  function prepare(data) {
    const options = { first: decode(data.first, Int32Array), source: decode(data.source, Int32Array), bits: decode(data.bits, Float64Array), cost: decode(data.cost, Float64Array) };
    view.problem = { ...options, labels: data.candidates.map((candidate) => candidate.label), fixedBits: data.header.fixed_bits };
    view.error = decode(data.std_error, Float32Array);
    view.rows = data.rows === null ? null : decode(data.rows, Float64Array);
    view.controlKl = data.control_rows.length ? RecompileSolver.exactSum(data.control_rows) / data.control_rows.length : 0;
    view.base = data.candidates.findIndex((candidate) => candidate.label === data.header.base);
    view.groups = data.groups.name.map((name, number) => ({
      name, number, layer: data.groups.layer[number], weights: data.groups.weights[number],
      modules: data.groups.modules[number] ?? [name],
    }));
    view.optionOf = view.groups.map(({ number }) => {
      const found = new Map();
      for (let option = view.problem.first[number]; option < view.problem.first[number + 1]; option++) found.set(view.problem.source[option], option);
      return found;
    });
    for (const one of [...data.measured, ...data.presets]) if (one.choice !== null) one.choice = decode(one.choice, Int32Array);
    view.weights = data.candidates.map(() => 0);
    const bits = data.candidates.map(() => 0);
    view.problem.source.forEach((source, option) => { bits[source] += view.problem.bits[option]; });
    view.optionOf.forEach((options, number) => options.forEach((_, source) => { view.weights[source] += view.groups[number].weights; }));
    view.width = bits.map((sum, source) => sum / Math.max(1, view.weights[source])); // bits per weight over what it offers
    view.byWidth = data.candidates.map((_, number) => number).sort((a, b) => view.width[a] - view.width[b]);
    const free = RecompileSolver.buildTable(view.problem, null);
    view.range = RecompileSolver.reachableRange(free);
    view.klRange = (({ cost }) => [cost[cost.length - 1] + view.controlKl, cost[0] + view.controlKl])(RecompileSolver.path(free));
    view.uniforms = view.byWidth.map((source) => {
      const choice = view.optionOf.map((options) => options.get(source));
      return choice.includes(undefined) ? null : { source, ...sizeAndKl(choice) };
    }).filter(Boolean);
    state.pinned = new Int16Array(view.groups.length).fill(-1);
    state.banned = new Uint8Array(view.problem.source.length);
    state.value = roundTo(bpwOf(data.start_bits), 2, view.range);
  }

  /* {bits, kl, error} of one option a group. */
  function sizeAndKl(option) {
    const { problem, rows, data } = view;
    let bits = problem.fixedBits;
    const costs = [];
    for (const index of option) {
      bits += problem.bits[index];
      costs.push(problem.cost[index]);
    }
    const kl = view.controlKl + RecompileSolver.exactSum(costs);
    const count = data.header.rows;
    if (rows === null || count < 2) return { bits, kl, error: NaN };
    const totals = Float64Array.from(data.control_rows);
    for (const index of option) for (let row = 0; row < count; row++) totals[row] += rows[index * count + row];
    const mean = totals.reduce((a, b) => a + b, 0) / count;
    const spread = totals.reduce((sum, total) => sum + (total - mean) ** 2, 0);
    return { bits, kl, error: Math.sqrt(spread / (count - 1) / count) };
  }

  function roundTo(value, places, [fewest, most]) { // a value that can be asked for as it stands
    const scale = 10 ** places;
    const low = Math.ceil(bpwOf(fewest) * 1e4) / 1e4;
    const high = Math.floor(bpwOf(most) * 1e4) / 1e4;
    return Math.min(high, Math.max(low, Math.round(value * scale) / scale));
  }

  /* ---- solving ---- */

  function allowedOptions() {
    const { problem, groups, optionOf } = view;
    const allowed = new Uint8Array(problem.source.length).fill(1);
    for (let option = 0; option < allowed.length; option++) if (state.banned[option]) allowed[option] = 0;
    for (const { number } of groups) {
      const pin = state.pinned[number];
      if (pin < 0) continue;
      for (const [source, option] of optionOf[number]) allowed[option] = source === pin ? 1 : 0;
    }
    return allowed;
  }

  /* The budget of the state in stored bits; for "kl" the limit of the cost. */
  function wanted() {
    const { header } = view.data;
    if (state.unit === "bpw") return { bits: Math.floor(state.value * header.counted_weights + 1e-6) };
    if (state.unit === "gib") return { bits: 8 * Math.round(state.value * 2 ** 30) - header.other_bits };
    return { cost: state.value - view.controlKl };
  }

  function solve() {
    const started = performance.now();
    if (!now.table) {
      now.table = RecompileSolver.buildTable(view.problem, allowedOptions());
      now.path = RecompileSolver.path(now.table);
      now.newTable = true;
    }
    const [fewest, most] = RecompileSolver.reachableRange(now.table);
    const { bits, cost } = wanted();
    let problem = "";
    if (bits !== undefined) {
      const inside = Math.min(most, Math.max(fewest, bits));
      if (inside !== bits) {
        problem = `${valueText(state.value)} is out of reach${isConstrained() ? " with these pins and bans" : ""}: the mixes go from ${spell(fewest)} to ${spell(most)}. Shown: the nearest.`;
      }
      now.found = RecompileSolver.solve(now.table, inside);
    } else {
      try {
        now.found = RecompileSolver.solveForCost(now.table, cost);
      } catch (error) {
        if (!(error instanceof RangeError)) throw error;
        now.found = RecompileSolver.solve(now.table, most);
        problem = `No mix is predicted to stay within ${klText(state.value)} nats per token${isConstrained() ? " with these pins and bans" : ""}. Shown: the least KL there is.`;
      }
    }
    Object.assign(now, sizeAndKl(now.found.option));
    now.source = Int32Array.from(now.found.option, (option) => view.problem.source[option]);
    now.solveMs = performance.now() - started;
    showProblem(problem);
    show();
    now.stepMs = performance.now() - started;
  }

  const isConstrained = () => state.pinned.some((pin) => pin >= 0) || state.banned.some(Boolean);

  function spell(bits) {
    return state.unit === "gib" ? `${digits(bytesOf(bits) / 2 ** 30, 4)} GiB` : `${digits(bpwOf(bits), 4)} bpw`;
  }

  function valueText(value) {
    if (state.unit === "bpw") return `${digits(value, 2)} bpw`;
    if (state.unit === "gib") return `${digits(value, value < 1 ? 4 : 2)} GiB`;
    return `${klText(value)} nats/token`;
  }

  /* KL of a uniform build at a size, between the builds there are (KL falls about exponentially with bits). */
  function uniformAt(bits) {
    const list = view.uniforms;
    for (let n = 0; n + 1 < list.length; n++) {
      const [low, high] = [list[n], list[n + 1]];
      if (bits < low.bits || bits > high.bits || low.kl <= 0 || high.kl <= 0) continue;
      const share = (bits - low.bits) / (high.bits - low.bits);
      return { low, high, kl: Math.exp(Math.log(low.kl) + share * (Math.log(high.kl) - Math.log(low.kl))) };
    }
    return null;
  }

  /* ---- undo ---- */

  function snapshot() {
    return { unit: state.unit, value: state.value, pinned: state.pinned.slice(), banned: state.banned.slice() };
  }

  /* Called after a change is whole: what was before it can come back. */
  function remember() {
    past.push(remember.last);
    if (past.length > 100) past.shift();
    future.length = 0;
    remember.last = snapshot();
    undoButtons();
  }

  function travel(from, to) {
    if (!from.length) return;
    to.push(remember.last);
    remember.last = from.pop();
    const { unit, value, pinned, banned } = remember.last;
    Object.assign(state, { unit, value, pinned: pinned.slice(), banned: banned.slice() });
    now.table = null;
    syncControls();
    solve();
    undoButtons();
  }

  function undoButtons() {
    $("undo").disabled = !past.length;
    $("redo").disabled = !future.length;
  }

  /* ---- pins and bans ---- */

  let strokePin = null; // what a drag that cycles gives to all its cells

  function act(cells, first) {
    const action = document.querySelector("#actions input:checked").value;
    applyAction(action, cells, Number($("brush-source").value), first);
  }

  function applyAction(action, cells, source, first) {
    const groups = cells.flatMap((cell) => cell.value);
    const before = snapshot();
    let skipped = 0;
    if (action === "cycle" && first) strokePin = nextInCycle(groups[0].number);
    for (const { number } of groups) {
      const options = view.optionOf[number];
      if (action === "free" || (action === "cycle" && strokePin < 0)) {
        state.pinned[number] = -1;
        for (const option of options.values()) state.banned[option] = 0;
      } else if (action === "ban") {
        const option = options.get(source);
        if (option === undefined || [...options.values()].every((other) => other === option || state.banned[other])) {
          skipped++;
          continue;
        }
        state.banned[option] = 1;
        if (state.pinned[number] === source) state.pinned[number] = -1;
      } else {
        const pin = action === "cycle" ? strokePin : source;
        const option = options.get(pin);
        if (option === undefined || !Number.isFinite(view.problem.cost[option])) {
          skipped++;
          continue;
        }
        state.pinned[number] = pin;
        state.banned[option] = 0;
      }
    }
    now.table = null;
    solve();
    const changed = before.pinned.some((pin, n) => pin !== state.pinned[n]) || before.banned.some((ban, n) => ban !== state.banned[n]);
    if (changed) remember();
    const why = action === "ban" ? "it is their last source" : "they do not offer this source";
    $("status").textContent = skipped ? `${skipped} of ${groups.length} groups stay as they are: ${why}.` : "";
    if (cells[0]) look(cells[0]);
  }

  /* free -> the next dearer source than now -> ... -> the dearest -> free; -1 is free */
  function nextInCycle(number) {
    const ring = view.byWidth.filter((source) => view.optionOf[number].has(source));
    const pin = state.pinned[number];
    const place = ring.indexOf(pin >= 0 ? pin : now.source[number]);
    if (pin < 0) return ring[(place + 1) % ring.length];
    return place + 1 < ring.length ? ring[place + 1] : -1;
  }

  /* ---- what stands still ---- */

  function words() {
    const { data } = view;
    const { header } = data;
    $("title").textContent = `${data.title}: which bits where`;
    const tokens = `${header.rows} rows × ${header.row_tokens} tokens`;
    $("subtitle").textContent = `${view.groups.length} groups of modules, ${data.candidates.length} sources each; KL profile: ${header.method}, ${tokens}`;
    const list = view.byWidth.map((source) => short(nameOf(source), 24)).join(", ");
    $("lead").textContent = `There are ${data.candidates.length} quantized builds of this model (${list}). Every group of modules can come from any of them. Move the slider to the size you can afford: the page finds the mix whose predictions stay closest to the unquantized model. Closeness is the KL divergence in nats per token; 0 is identical.`;
    if (header.method !== "exact") {
      $("how-known").textContent = `Its KL is a prediction: the cost of every swap was estimated (method ${header.method}) and the costs are added up. Errors of several swaps can add more or cancel. Measure the recipe before you trust it:`;
    }
    const about = [
      ["Reference", header.reference], ["Profile", `${data.profile_name}: method ${header.method}, context ${header.context}, level ${header.level}`],
      ["Measured on", `${tokens}, ${header.rows_source} (sha256 ${header.rows_sha256.slice(0, 16)}), ${header.dtype} on ${header.device}`],
      ["Sources", data.candidates.map((candidate) => `${candidate.label} = ${candidate.dir}`).join("; ")],
      ["Not chosen here", `${sizeText(header.other_bits / 8)} of embedding, head and norms, as in ${nameOf(view.base)}; counted in sizes, not in bits per weight`],
      ["Units", "KL(reference || candidate) in nats per token, mean over tokens, ± one standard error over rows; bits per weight (bpw) over quantized modules with scales and zero points; 1 GiB = 2^30 bytes"],
      ["Solver", "lower convex hull and Lagrangian multiplier, then exchanges: the same as model_optimize --solver greedy"],
      ["Versions", Object.entries(header.versions).map(([name, version]) => `${name} ${version}`).concat(`report ${data.version}`).join(", ")],
    ];
    $("about").replaceChildren(...about.flatMap(([name, text]) => [make("dt", {}, name), make("dd", {}, text)]));
    $("notes").textContent = data.notes.join(" ");
    $("detail").replaceChildren(make("p", { className: "quiet" }, "Point at a cell for its modules, sizes and the KL of every source."));
  }

  function segments(id, entries, chosen, change) {
    for (const [value, text] of Object.entries(entries)) {
      const input = make("input", { type: "radio", name: id, value, checked: value === chosen });
      input.addEventListener("change", () => change(value));
      $(id).append(make("label", {}, input, text));
    }
  }

  function controls() {
    segments("units", { bpw: "bits per weight", gib: "GiB", kl: "max KL" }, state.unit, changeUnit);
    segments("actions", ACTIONS, "cycle", () => syncControls());
    segments("frontier-axis", { bpw: "bits per weight", gib: "GiB" }, "bpw", () => drawFrontier());
    segments("drift-kind", { sqnr: "SQNR", cosine: "cosine error" }, "sqnr", () => drawDrift());
    for (const source of view.byWidth) $("brush-source").append(make("option", { value: String(source) }, short(nameOf(source), 40)));
    $("brush-source").value = String(view.byWidth[view.byWidth.length - 1]);
    $("slider").addEventListener("input", () => {
      state.value = valueAt(Number($("slider").value));
      syncControls(false);
      solve();
    });
    $("slider").addEventListener("change", remember);
    $("exact").addEventListener("change", () => {
      const value = Number($("exact").value.trim().replace(",", "."));
      if (!$("exact").value.trim() || !Number.isFinite(value) || value < 0) {
        showProblem(`"${short($("exact").value, 30)}" is not a number of ${UNITS[state.unit].short}.`);
        return;
      }
      state.value = value;
      syncControls();
      solve();
      remember();
    });
    $("clear").addEventListener("click", () => {
      state.pinned.fill(-1);
      state.banned.fill(0);
      now.table = null;
      solve();
      remember();
    });
    $("undo").addEventListener("click", () => travel(past, future));
    $("redo").addEventListener("click", () => travel(future, past));
    document.addEventListener("keydown", (event) => {
      const typing = event.target instanceof HTMLInputElement && event.target.type === "text";
      if (typing || !(event.ctrlKey || event.metaKey) || !["z", "y"].includes(event.key.toLowerCase())) return;
      event.preventDefault();
      const forward = event.shiftKey || event.key.toLowerCase() === "y";
      travel(forward ? future : past, forward ? past : future);
    });
    $("theme").addEventListener("click", () => {
      const order = ["system", "light", "dark"];
      setTheme(order[(order.indexOf($("theme").dataset.choice) + 1) % 3]);
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setTheme($("theme").dataset.choice));
    $("copy").addEventListener("click", copyRecipe);
    $("download").addEventListener("click", downloadRecipe);
    compareControls();
    syncControls();
  }

  function setTheme(choice) {
    const chosen = choice ?? "system";
    $("theme").dataset.choice = chosen;
    $("theme").textContent = `Theme: ${chosen === "system" ? "as the system" : chosen}`;
    const dark = chosen === "system" ? matchMedia("(prefers-color-scheme: dark)").matches : chosen === "dark";
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    if (window.Plotly) redrawCharts();
  }

  /* Slider places 0..1000: linear in size, logarithmic in KL (few bits at the left, always). */
  function valueAt(place) {
    const share = place / 1000;
    if (state.unit === "kl") {
      const [least, most] = [Math.max(view.klRange[0], view.klRange[1] * 1e-6), view.klRange[1]];
      const value = Math.exp(Math.log(most) + share * (Math.log(least) - Math.log(most)));
      return place === 1000 ? view.klRange[0] : Number(value.toPrecision(3));
    }
    const bits = view.range[0] + share * (view.range[1] - view.range[0]);
    if (state.unit === "bpw") return roundTo(bpwOf(bits), 2, view.range);
    const bytes = bytesOf(bits);
    const step = 10 ** Math.max(0, Math.floor(Math.log10(bytesOf(view.range[1]) - bytesOf(view.range[0]))) - 2);
    const inside = Math.min(bytesOf(view.range[1]), Math.max(Math.ceil((view.range[0] + view.data.header.other_bits) / 8), Math.round(bytes / step) * step));
    return inside / 2 ** 30;
  }

  function placeOf(value) {
    if (state.unit === "kl") {
      const [least, most] = [Math.max(view.klRange[0], view.klRange[1] * 1e-6), view.klRange[1]];
      return 1000 * (Math.log(most) - Math.log(Math.max(value, least))) / (Math.log(most) - Math.log(least) || 1);
    }
    const bits = state.unit === "bpw" ? value * view.data.header.counted_weights : value * 2 ** 33 - view.data.header.other_bits;
    return 1000 * (bits - view.range[0]) / (view.range[1] - view.range[0] || 1);
  }

  function changeUnit(unit) {
    state.unit = unit;
    if (unit === "bpw") state.value = roundTo(Math.ceil(bpwOf(now.bits) * 1e4) / 1e4, 4, view.range);
    if (unit === "gib") state.value = Math.ceil((now.bits + view.data.header.other_bits) / 8) / 2 ** 30;
    if (unit === "kl") state.value = Number((now.kl * 1.0005).toPrecision(4));
    syncControls();
    solve();
    remember();
  }

  function syncControls(moveSlider = true) {
    const unit = UNITS[state.unit];
    for (const input of document.querySelectorAll("#units input")) input.checked = input.value === state.unit;
    if (moveSlider) $("slider").value = String(Math.round(placeOf(state.value)));
    $("slider-name").textContent = valueText(state.value);
    $("slider").setAttribute("aria-label", unit.name);
    $("slider").setAttribute("aria-valuetext", valueText(state.value));
    $("exact").value = state.unit === "gib" ? state.value.toFixed(6).replace(/0+$/, "") : String(state.value);
    $("exact").setAttribute("aria-label", `exact ${unit.name}`);
    $("exact-unit").textContent = unit.short;
    const action = document.querySelector("#actions input:checked").value;
    $("brush-source-label").hidden = !["pin", "ban"].includes(action);
  }

  function showProblem(text) {
    $("problem").textContent = text;
    $("problem").hidden = !text;
  }

  /* ---- the maps ---- */

  function gridShape() {
    const kinds = new Map();
    const layers = [...new Set(view.groups.map((group) => group.layer))].sort((a, b) => (a ?? Infinity) - (b ?? Infinity));
    const prefixes = new Set(view.groups.map((group) => /^(.*?)\.\d+(\.|$)/.exec(group.name)?.[1]));
    const cells = new Map();
    for (const group of view.groups) {
      const found = group.layer === null ? null : /^(.*?)\.\d+(?:\.(.+))?$/.exec(group.name);
      let kind = found ? (found[2] ?? "whole layer").split(".").map((word) => (/^\d+$/.test(word) ? "*" : word)).join(".") : group.name;
      if (found && prefixes.size > 2) kind = `${found[1]}: ${kind}`;
      if (!kinds.has(kind)) kinds.set(kind, kinds.size);
      const key = `${kinds.get(kind)} ${layers.indexOf(group.layer)}`;
      if (!cells.has(key)) cells.set(key, []);
      cells.get(key).push(group);
    }
    return { kinds: [...kinds.keys()], layers, cells, layerName: (layer) => (layer === null ? "–" : String(layer)) };
  }

  function buildMaps() {
    const shape = gridShape();
    view.map = new Grid($("map"), shape, { look, act, key: mapKey });
    view.heat = new Grid($("heat"), shape, { look: lookHeat, act: () => {} });
    $("map").setAttribute("aria-label", "Source of every group, layers by modules");
    $("heat").setAttribute("aria-label", "KL by layers and modules");
    const kinds = [];
    for (let n = 0; n + 1 < view.byWidth.length; n++) {
      const [low, high] = [view.byWidth[n], view.byWidth[n + 1]];
      kinds.push([`saved ${low} ${high}`, `KL saved per Mbit, from ${short(nameOf(low), 20)} to ${short(nameOf(high), 20)}`]);
    }
    for (const source of view.byWidth) kinds.push([`raw ${source}`, `KL of the swap to ${short(nameOf(source), 30)}`]);
    $("heat-kind").replaceChildren(...kinds.map(([value, text]) => make("option", { value }, text)));
    const place = view.byWidth.indexOf(view.base);
    if (view.byWidth.length > 1) $("heat-kind").selectedIndex = Math.min(Math.max(place, 0), view.byWidth.length - 2);
    $("heat-kind").addEventListener("change", paintHeat);
    paintHeat();
  }

  function mapKey(cell, letter) {
    const source = now.source[cell.value[0].number];
    const action = { c: "cycle", p: "pin", b: "ban", f: "free", Delete: "free" }[letter];
    if (action) applyAction(action, [cell], source, true);
    return Boolean(action);
  }

  function widthShare(bitsPerWeight) {
    const [low, high] = [view.width[view.byWidth[0]], view.width[view.byWidth[view.byWidth.length - 1]]];
    return high > low ? (bitsPerWeight - low) / (high - low) : 1;
  }

  function paintMap() {
    const rival = view.rival?.choice;
    view.map.paint((cell) => {
      const groups = cell.value;
      let bits = 0;
      let weights = 0;
      let pinned = 0;
      let banned = 0;
      let differs = false;
      const sources = new Set();
      for (const { number, weights: size } of groups) {
        bits += view.problem.bits[now.found.option[number]];
        weights += size;
        sources.add(now.source[number]);
        pinned += state.pinned[number] >= 0 ? 1 : 0;
        for (let option = view.problem.first[number]; option < view.problem.first[number + 1]; option++) banned += state.banned[option];
        if (rival && rival[number] !== now.source[number]) differs = true;
      }
      const { background, ink } = shade(widthShare(bits / Math.max(1, weights)));
      const one = sources.size === 1 ? nameOf([...sources][0]) : digits(bits / Math.max(1, weights), 1);
      const classes = [pinned && "pinned", banned && "banned", differs && "differs"].filter(Boolean).join(" ");
      const marks = `${pinned ? ", pinned" : ""}${banned ? ", with a ban" : ""}${differs ? ", differs" : ""}`;
      const layer = cell.layer === null ? "" : `layer ${cell.layer}, `;
      const label = `${layer}${short(cell.kind, 60)}: ${sources.size === 1 ? `source ${short(one, 40)}` : `${one} bits per weight, mixed`}${marks}`;
      return { text: one.length <= 3 ? one : one.slice(0, 2) + "…", background, ink, classes, label };
    });
  }

  function paintLegend() {
    const modules = view.data.candidates.map(() => 0);
    const weights = view.data.candidates.map(() => 0);
    let all = 0;
    for (const { number, modules: names, weights: size } of view.groups) {
      modules[now.source[number]] += names.length;
      weights[now.source[number]] += size;
      all += size;
    }
    $("legend").replaceChildren(...view.byWidth.map((source) => {
      const { background, ink } = shade(widthShare(view.width[source]));
      const label = nameOf(source);
      const square = make("i", { style: `background:${background};color:${ink}`, "aria-hidden": "true" }, label.length <= 3 ? label : "");
      const share = digits(100 * weights[source] / Math.max(1, all), 0);
      return make("span", {}, square, `${label.length <= 3 ? "" : `${short(label, 24)}: `}${digits(view.width[source], 2)} bpw, ${share} % of weights`);
    }));
  }

  function look(cell) {
    const groups = cell.value;
    const sources = view.byWidth.filter((source) => groups.some((group) => view.optionOf[group.number].has(source)));
    const rows = sources.map((source) => {
      let [bits, kl, variance, weights, chosen, pinned, banned, offered] = [0, 0, 0, 0, 0, 0, 0, 0];
      for (const { number, weights: size } of groups) {
        const option = view.optionOf[number].get(source);
        if (option === undefined) continue;
        offered++;
        bits += view.problem.bits[option];
        kl += view.problem.cost[option];
        variance += view.error[option] ** 2;
        weights += size;
        chosen += now.source[number] === source ? 1 : 0;
        pinned += state.pinned[number] === source ? 1 : 0;
        banned += state.banned[option];
      }
      const count = (n, word) => (n === 0 ? null : groups.length === 1 ? word : `${word} ${n} of ${offered}`);
      const words = [count(chosen, "chosen"), count(pinned, "pinned"), count(banned, "banned")].filter(Boolean).join(", ");
      return [short(nameOf(source), 40), digits(bits / Math.max(1, weights), 3), sizeText(bits / 8), withError(kl, Math.sqrt(variance)), words];
    });
    const table = make("table", { className: "plain" });
    fillTable(table, ["source", "bits per weight", "size", "KL, nats/token", ""], rows);
    const names = groups.length === 1 ? groups[0].modules : groups.map((group) => group.name);
    const text = names.length === 1 ? names[0] : `${names.slice(0, 4).map((name) => short(name, 200)).join(", ")}${names.length > 4 ? ` and ${names.length - 4} more` : ""}`;
    $("detail").replaceChildren(make("p", {}, short(text, 700)), table);
  }

  /* ---- the heat map ---- */

  /* {value, error, negative} in nats per Mbit ("saved") or nats ("raw") of a cell. */
  function heatValue(groups) {
    const [kind, first, second] = $("heat-kind").value.split(" ");
    const [low, high] = [Number(first), Number(second)];
    const count = view.data.header.rows;
    let [value, variance, bits, found] = [0, 0, 0, 0];
    for (const { number } of groups) {
      const a = view.optionOf[number].get(low);
      const b = kind === "raw" ? a : view.optionOf[number].get(high);
      if (a === undefined || b === undefined) continue;
      found++;
      if (kind === "raw") {
        value += view.problem.cost[a];
        variance += view.error[a] ** 2;
        bits = 1e6;
      } else {
        const saved = view.problem.cost[a] - view.problem.cost[b];
        value += saved;
        bits += view.problem.bits[b] - view.problem.bits[a];
        if (view.rows !== null && count > 1) {
          let spread = 0;
          for (let row = 0; row < count; row++) spread += (view.rows[a * count + row] - view.rows[b * count + row] - saved) ** 2;
          variance += spread / (count - 1) / count;
        } else {
          variance += view.error[a] ** 2 + view.error[b] ** 2;
        }
      }
    }
    if (!found || !bits) return null;
    const scale = 1e6 / bits;
    return { value: value * scale, error: Math.sqrt(variance) * scale };
  }

  function paintHeat() {
    const values = new Map();
    for (const cell of view.heat.cells.values()) values.set(cell, heatValue(cell.value));
    const real = [...values.values()].filter((found) => found && found.value > 0).map((found) => found.value).sort((a, b) => a - b);
    const high = real[real.length - 1] ?? 1;
    const low = Math.max(real[Math.floor(0.03 * real.length)] ?? high, high * 1e-4); // a few outliers shall not grey the rest
    const raw = $("heat-kind").value.startsWith("raw");
    const unit = raw ? "nats/token" : "nats/token per Mbit";
    view.heatUnit = unit;
    view.heat.paint((cell) => {
      const found = values.get(cell);
      const layer = cell.layer === null ? "" : `layer ${cell.layer}, `;
      const name = `${layer}${short(cell.kind, 60)}: `;
      if (!found) return { text: "", background: "", ink: "", classes: "", label: `${name}not offered` };
      const label = `${name}${withError(found.value, found.error)} ${unit}`;
      if (!(found.value > 0)) return { text: "", background: "", ink: "", classes: "noise", label: `${label}, not above zero` };
      const share = high > low ? Math.log(Math.max(found.value, low) / low) / Math.log(high / low) : 1;
      return { text: "", ...shade(share), classes: "", label };
    });
    $("heat-text").textContent = raw
      ? "KL that this source alone adds when one group is taken from it and all else stays as profiled. Bright: it hurts most here."
      : "KL that a million more bits save in each place. Bright: bits are best spent here. This ratio is what the solver sorts by.";
    $("heat-scale").replaceChildren(`≤ ${klText(low)}`, make("i", { style: `background:${gradient}`, "aria-hidden": "true" }), `${klText(high)} ${unit}, logarithmic; hatched: not above zero, i.e. noise`);
    $("heat-detail").replaceChildren(make("p", { className: "quiet" }, "Point at a cell, or walk with the arrow keys, for its value and standard error."));
  }

  function lookHeat(cell) {
    const found = heatValue(cell.value);
    const layer = cell.layer === null ? "" : `Layer ${cell.layer}, `;
    const many = cell.value.length > 1 ? ` (${cell.value.length} groups together)` : "";
    const text = `${layer}${short(cell.kind, 200)}${many}: ${found ? `${withError(found.value, found.error)} ${view.heatUnit}` : "not offered"}`;
    const rows = view.byWidth.map((source) => {
      const options = cell.value.map((group) => view.optionOf[group.number].get(source)).filter((option) => option !== undefined);
      const kl = options.reduce((sum, option) => sum + view.problem.cost[option], 0);
      const error = Math.sqrt(options.reduce((sum, option) => sum + view.error[option] ** 2, 0));
      return [short(nameOf(source), 40), options.length ? withError(kl, error) : "–"];
    });
    const table = make("table", { className: "plain" });
    fillTable(table, ["source", "KL of the swap, nats/token"], rows);
    $("heat-detail").replaceChildren(make("p", {}, text), table);
  }

  /* ---- what a solve shows ---- */

  function show() {
    const uniform = uniformAt(now.bits);
    const better = uniform ? 1 - now.kl / uniform.kl : null;
    const tiles = [
      ["Size of all tensors", sizeText(bytesOf(now.bits)), `embedding, head and norms included`],
      ["Bits per weight", digits(bpwOf(now.bits), 3), "over quantized modules"],
      ["Predicted KL", klText(now.kl), Number.isFinite(now.error) ? `± ${klText(now.error)} nats per token` : "nats per token"],
      ["Against uniform", better === null ? "–" : better >= 0 ? `${digits(100 * better, 0)} % less KL` : `${digits(-100 * better, 0)} % more KL`,
        uniform ? `${klText(uniform.kl)} at this size, between uniform ${short(nameOf(uniform.low.source), 12)} and ${short(nameOf(uniform.high.source), 12)}` : "no two uniform builds around this size"],
    ];
    $("figures").replaceChildren(...tiles.map(([name, value, note]) => make("div", {}, make("dt", {}, name),
      make("dd", { className: name === "Against uniform" && better > 0 ? "good" : "" }, value, make("small", {}, note)))));
    $("clear").disabled = !isConstrained();
    paintMap();
    paintLegend();
    showDifference();
    clearTimeout(show.later);
    show.later = setTimeout(showLater, 90); // what may trail behind a moving slider
    moveMarker();
  }

  function showLater() {
    const lines = recipeLines();
    const more = lines.length - YAML_LINES_SHOWN;
    $("yaml").textContent = (more > 0 ? [...lines.slice(0, YAML_LINES_SHOWN), `# ... ${more} more lines in the download`] : lines).join("\n");
    const { header, candidates } = view.data;
    const base = shellWord(candidates[view.base].dir), reference = shellWord(header.reference);
    const report = `model_report ${shellWord(view.data.profile_name)} mix.json -o report.html    # the measured point appears in these charts`;
    $("commands").textContent = candidates[view.base].made
      ? `model_quantize -i ${reference} -o OUT -or overrides.yaml    # makes the checkpoint in one calibrated pass\nmodel_diff -ma OUT -mb ${reference} -r 16 --json mix.json\n${report}`
      : `model_diff -ma ${base} -mb ${reference} -or overrides.yaml -r 16 --json mix.json\n${report}\nrecompile -i ${base} -o OUT -or overrides.yaml --verify                # writes the checkpoint`;
    if (window.Plotly && now.newTable) drawFrontier();
    now.newTable = false;
  }

  const shellWord = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

  /* ---- the recipe ---- */

  function recipeLines() {
    const { data, problem, optionOf, base } = view;
    const groups = view.groups.map(({ number, modules, layer }) => {
      const option = now.found.option[number];
      const from = optionOf[number].get(base);
      const there = problem.bits[option] - (from === undefined ? 0 : problem.bits[from]);
      const mega = `${there < 0 ? "" : "+"}${digits(there / 1e6, 3)} Mbit`;
      const gain = from === undefined ? null : problem.cost[option] - problem.cost[from];
      const kl = gain === null ? "" : `KL ${gain < 0 ? "" : "+"}${digits(gain, 6)}, `;
      return { modules, layer, source: now.source[number], comment: `${kl}${mega}${state.pinned[number] >= 0 ? ", pinned" : ""}` };
    });
    const directory = data.candidates[base].dir;
    const error = Number.isFinite(now.error) ? digits(now.error, 6) : "null";
    const asked = state.unit === "kl" ? `at most ${state.value} nats per token, predicted`
      : state.unit === "gib" ? `${state.value} GiB` : `${state.value} bpw over quantized modules`;
    const quote = RecompileRecipe.quote;
    return RecompileRecipe.write({
      groups, base, candidates: data.candidates,
      header: [
        `${digits(bpwOf(now.bits), 4)} bits per weight over quantized modules (${asked} asked for).`,
        `Predicted KL ${digits(now.kl, 6)} nats per token (${data.header.method} profile, added up): not measured.`,
        ...(data.candidates[base].made
          ? ["Make it:", `  model_quantize -i ${shellWord(data.header.reference)} -o OUT -or overrides.yaml`]
          : [`Apply to ${directory}:`, `  recompile -i ${shellWord(directory)} -o OUT -or overrides.yaml`]),
        `After each line: KL and bits against the same modules taken from ${directory}.`,
      ],
      tail: [
        ...data.candidates[base].base_lines, `budget: ${quote(asked)}`, "provenance:", "  made_by: model_report", "  solver: greedy",
        `  bpw: ${digits(bpwOf(now.bits), 5)}`, `  total_bytes: ${bytesOf(now.bits)}`,
        `  predicted_kl_nats: ${digits(now.kl, 6)}`, `  predicted_std_error: ${error}`,
        `  profile: {method: ${quote(data.header.method)}, rows_sha256: ${quote(data.header.rows_sha256)}}`,
      ],
    });
  }

  const recipeText = () => `${recipeLines().join("\n")}\n`;

  async function copyRecipe() {
    let done = true;
    try {
      await navigator.clipboard.writeText(recipeText());
    } catch {
      const area = make("textarea", { value: recipeText(), style: "position:fixed;opacity:0" }); // from disk there may be no clipboard API
      document.body.append(area);
      area.select();
      done = document.execCommand("copy");
      area.remove();
      $("copy").focus();
    }
    $("copied").textContent = done ? "Copied." : "The browser refused; use Download.";
  }

  function downloadRecipe() {
    const url = URL.createObjectURL(new Blob([recipeText()], { type: "application/yaml" }));
    const link = make("a", { href: url, download: "overrides.yaml" });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
    $("copied").textContent = "";
  }

  /* ---- comparing ---- */

  function compareControls() {
    const { data } = view;
    view.rivals = [
      ...view.uniforms.map(({ source }) => ({ name: `uniform ${nameOf(source)}`, choice: new Int32Array(view.groups.length).fill(source) })),
      ...data.measured.filter((one) => one.choice && one.uniform === null).map((one) => ({ name: one.name, choice: one.choice })),
      ...data.presets.map((one) => ({ name: one.name, choice: one.choice })),
    ];
    fillCompare(-1);
    $("compare").addEventListener("change", () => {
      view.rival = view.rivals[Number($("compare").value)] ?? null;
      show();
    });
    const take = (file) => file && file.text().then((text) => compareText(text, file.name));
    $("file").addEventListener("change", () => take($("file").files[0]));
    const drop = $("drop");
    for (const kind of ["dragenter", "dragover"]) {
      drop.addEventListener(kind, (event) => {
        event.preventDefault();
        drop.classList.add("over");
      });
    }
    drop.addEventListener("dragleave", () => drop.classList.remove("over"));
    drop.addEventListener("drop", (event) => {
      event.preventDefault();
      drop.classList.remove("over");
      take(event.dataTransfer.files[0]);
    });
    for (const kind of ["dragover", "drop"]) window.addEventListener(kind, (event) => event.preventDefault()); // never leave the page
  }

  function fillCompare(chosen) {
    $("compare").replaceChildren(make("option", { value: "-1" }, "nothing"), ...view.rivals.map((rival, n) => make("option", { value: String(n) }, short(rival.name, 50))));
    $("compare").value = String(chosen);
  }

  function compareText(text, name) {
    try {
      const recipe = RecompileRecipe.parse(text);
      const named = recipe.base === null ? -1 : RecompileRecipe.candidateOf(recipe.base, view.data.candidates);
      const choice = RecompileRecipe.choiceOf(recipe, view.groups, view.data.candidates, named < 0 ? view.base : named);
      const odd = choice.findIndex((source, number) => !view.optionOf[number].has(source));
      if (odd >= 0) throw new Error(`${view.groups[odd].name} is not profiled from source ${nameOf(choice[odd])}`);
      view.rivals.push({ name, choice: Int32Array.from(choice) });
      fillCompare(view.rivals.length - 1);
      view.rival = view.rivals[view.rivals.length - 1];
      show();
    } catch (error) {
      view.rival = null;
      fillCompare(-1);
      show();
      $("difference").textContent = `${short(name, 60)}: ${short(error.message, 300)}`;
    }
  }

  function showDifference() {
    const { rival } = view;
    if (!rival) {
      $("difference").textContent = "";
      return;
    }
    const option = Int32Array.from(rival.choice, (source, number) => view.optionOf[number].get(source));
    const { bits, kl } = sizeAndKl(option);
    const different = rival.choice.reduce((sum, source, number) => sum + (source !== now.source[number] ? 1 : 0), 0);
    const size = bytesOf(now.bits) - bytesOf(bits);
    const sizes = size === 0 ? "the same size" : `${sizeText(Math.abs(size))} ${size < 0 ? "smaller" : "larger"}`;
    const change = kl > 0 ? ` (${now.kl <= kl ? "−" : "+"}${digits(100 * Math.abs(now.kl / kl - 1), 0)} %)` : "";
    $("difference").textContent = `${short(rival.name, 60)}: ${digits(bpwOf(bits), 3)} bpw, predicted KL ${klText(kl)}. This mix is ${sizes}, KL ${klText(now.kl)}${change}; ${different} of ${view.groups.length} groups differ, dashed in the map.`;
  }

  /* ---- measured ---- */

  function measuredTable() {
    const { measured, builds } = view.data;
    $("measured-charts").hidden = !measured.length;
    if (!measured.length) {
      $("measured-text").textContent = "No measured build was given. Run model_diff --json for the builds and mixes of interest and add the files to the command: model_report profile.jsonl diff1.json diff2.json -o report.html";
      if (!builds.length) return;
    } else {
      const rows = [...new Set(measured.map((one) => `${one.rows} rows × ${one.row_tokens} tokens, ${one.rows_source}`))];
      $("measured-text").textContent = `By running each build beside the reference (model_diff): ${rows.join("; ")}. These rows are not those of the profile.`;
    }
    const share = (value) => (value === null ? "–" : `${digits(100 * value, 1)} %`);
    const rows = measured.map((one) => [short(one.name, 60), one.bpw === null ? "–" : digits(one.bpw, 3), one.total_bytes === null ? "–" : sizeText(one.total_bytes),
      withError(one.kl_nats, one.std_error), one.predicted_kl_nats === null ? `– ${short(one.note, 80)}` : withError(one.predicted_kl_nats, one.predicted_std_error),
      klText(one.quantiles.median), klText(one.quantiles.p99), one.perplexity === null ? "–" : digits(one.perplexity, 3), share(one.same_top_token),
      one.delta_p_rms === null ? "–" : `${digits(100 * one.delta_p_rms, 2)} %`, share(one.sure_flips), one.divergence === null ? "–" : one.divergence.median === null ? "half never" : `after ${one.divergence.median}`, measured.length > 1 ? besideBest(one) : "–"]);
    for (const build of builds) if (!measured.some((one) => one.total_bytes === build.total_bytes)) rows.push([short(build.name, 60), digits(build.bpw, 3), sizeText(build.total_bytes), "not measured", "–", "–", "–", "–", "–", "–", "–", "–", "–"]);
    const header = ["build", "bits per weight", "size", "KL, nats/token", "predicted KL", "median token", "99th percentile", "perplexity", "same top token", "RMS delta p", "sure tokens changed", "greedy runs part", "more than the best"];
    const told = header.map((_, column) => column < 4 || rows.some((row) => row[column] !== "–")); // columns that say something
    const kept = (row) => row.filter((_, column) => told[column]);
    fillTable($("measured"), kept(header), rows.map(kept));
  }

  /* ---- charts ---- */

  async function drawCharts() {
    const code = make("script", {}, await inflate("plotly"));
    document.head.append(code);
    redrawCharts();
    document.documentElement.dataset.ready = "charts";
  }

  function redrawCharts() {
    drawFrontier();
    if (!view.data.measured.length) return;
    drawTrust();
    drawTokens();
    drawConfidence();
    drawDrift();
    RecompileDetails.draw(view.data.measured, { digits, klText, withError, short, sizeText, nickname });
  }

  /* "model.layers.3.self_attn.q_proj+k_proj" -> "3 q_proj+k_proj" */
  const nickname = (group) => {
    const layer = /\.(\d+)\./.exec(group);
    const last = group.slice(group.lastIndexOf(".") + 1);
    return layer ? `${layer[1]} ${last}` : last;
  };

  /* KL less that of the build of the smallest, paired over rows where both ran on the same ones. */
  function besideBest(one) {
    const best = view.data.measured.reduce((a, b) => (b.kl_nats < a.kl_nats ? b : a));
    if (one === best) return "the least";
    const rows = one.kl_rows.length;
    const difference = one.kl_nats - best.kl_nats;
    if (one.rows_sha256 !== best.rows_sha256 || rows !== best.kl_rows.length || rows < 2) return `+${klText(difference)}, other rows`;
    const parts = one.kl_rows.map((value, row) => value - best.kl_rows[row]);
    const mean = parts.reduce((a, b) => a + b, 0) / rows;
    const spread = parts.reduce((sum, part) => sum + (part - mean) ** 2, 0);
    return `+${withError(difference, Math.sqrt(spread / (rows - 1) / rows))}`;
  }

  function chartTable(id, header, rows, summary) {
    const table = make("table", { className: "plain" });
    fillTable(table, header, rows);
    const details = document.querySelector(`.numbers[data-of="${id}"]`);
    details.replaceChildren(details.querySelector("summary"), table);
    $(id).setAttribute("aria-label", summary);
  }

  const inGib = () => document.querySelector("#frontier-axis input:checked").value === "gib";
  const across = (bits) => (inGib() ? bytesOf(bits) / 2 ** 30 : bpwOf(bits));
  const mark = (color, symbol, size = 10) => ({ color, symbol, size, line: { width: 1.5, color } });

  function drawFrontier() {
    if (!window.Plotly) return;
    const colours = theme();
    const { data } = view;
    const step = Math.max(1, Math.floor(now.path.bits.length / 240));
    const line = now.path.bits.map((bits, n) => ({ bits, kl: now.path.cost[n] + view.controlKl }))
      .filter((point, n) => point.kl > 0 && (n % step === 0 || n === now.path.bits.length - 1));
    const words = (name, bits, kl, how) => `${plain(name)}<br>${digits(bpwOf(bits), 3)} bpw, ${sizeText(bytesOf(bits))}<br>KL ${kl} nats/token, ${how}`;
    const points = (name, list, marker, more = {}) => ({ name, mode: "markers+text", x: list.map((one) => one.x), y: list.map((one) => one.kl),
      text: list.map((one) => plain(one.label, 18)), textposition: "top right", textfont: { color: colours.ink, size: 11.5 }, hoverinfo: "text", hovertext: list.map((one) => one.words), marker, ...more });
    const uniform = view.uniforms.filter((one) => one.kl > 0).map((one) => ({ x: across(one.bits), kl: one.kl, label: nameOf(one.source), words: words(`uniform ${nameOf(one.source)}`, one.bits, withError(one.kl, one.error), "predicted") }));
    const measured = data.measured.filter((one) => one.bpw !== null && one.kl_nats > 0);
    const sized = (one) => (inGib() ? one.total_bytes / 2 ** 30 : one.bpw);
    const described = (one) => `${plain(one.name)}<br>${digits(one.bpw, 3)} bpw, ${sizeText(one.total_bytes)}<br>KL ${withError(one.kl_nats, one.std_error)} nats/token, measured`;
    const measuredPoints = (name, list, marker, labels) => points(name, list.map((one) => ({ x: sized(one), kl: one.kl_nats, label: labels ? one.name : "", words: described(one) })), marker,
      { error_y: { type: "data", array: list.map((one) => one.std_error ?? 0), color: marker.color, thickness: 1.5, width: 4 }, textposition: "bottom left" });
    const presets = data.presets.filter((one) => one.predicted_kl_nats > 0);
    const traces = [
      { name: "best mixes, predicted", mode: "lines", x: line.map((one) => across(one.bits)), y: line.map((one) => one.kl), line: { color: colours.lines[0], width: 2.5 }, hoverinfo: "text", hovertext: line.map((one) => words("best mix", one.bits, klText(one.kl), "predicted")) },
      points("uniform, predicted", uniform, mark(colours.quiet, "circle-open"), { mode: "lines+markers+text", line: { color: colours.quiet, dash: "dot", width: 1.5 } }),
      measuredPoints("uniform, measured", measured.filter((one) => one.uniform !== null), mark(colours.lines[1], "square", 8), false),
      measuredPoints("mixes, measured", measured.filter((one) => one.uniform === null), mark(colours.lines[2], "diamond", 11), true),
      points("other recipes, predicted", presets.map((one) => ({ x: across(one.bits), kl: one.predicted_kl_nats, label: one.name, words: words(one.name, one.bits, withError(one.predicted_kl_nats, one.predicted_std_error), "predicted") })), mark(colours.lines[3], "triangle-up-open", 11)),
      { name: "this mix", mode: "markers", x: [across(now.bits)], y: [now.kl], hoverinfo: "name", marker: { symbol: "star", size: 17, color: colours.mark, line: { color: colours.paper, width: 1.5 } } },
    ].filter((trace, n) => n === 5 || trace.x.length);
    view.markerTrace = traces.length - 1;
    draw("frontier", traces, layout(colours, axis(colours, inGib() ? "size of all tensors, GiB" : "bits per weight over quantized modules"), logAxis(colours, "KL, nats per token")));
    const rows = [...view.uniforms.map((one) => [`uniform ${nameOf(one.source)}`, digits(bpwOf(one.bits), 3), sizeText(bytesOf(one.bits)), withError(one.kl, one.error), "predicted"]),
      ...measured.map((one) => [short(one.name, 60), digits(one.bpw, 3), sizeText(one.total_bytes), withError(one.kl_nats, one.std_error), "measured"]),
      ...presets.map((one) => [short(one.name, 60), digits(one.bpw, 3), sizeText(one.total_bytes), withError(one.predicted_kl_nats, one.predicted_std_error), "predicted"]),
      ...[0, 0.25, 0.5, 0.75, 1].map((share) => line[Math.round(share * (line.length - 1))]).filter(Boolean).map((one) => ["best mix", digits(bpwOf(one.bits), 3), sizeText(bytesOf(one.bits)), klText(one.kl), "predicted"])];
    chartTable("frontier", ["build", "bits per weight", "size", "KL, nats/token", ""], rows, `KL against size: best mixes from ${digits(bpwOf(now.path.bits[0]), 2)} bpw to ${digits(bpwOf(now.path.bits[now.path.bits.length - 1]), 2)} bpw, ${view.uniforms.length} uniform builds, ${measured.length} measured. The numbers follow.`);
  }

  function moveMarker() {
    if (!window.Plotly || view.markerTrace === undefined || moveMarker.waiting) return;
    moveMarker.waiting = true; // at most once a frame
    requestAnimationFrame(() => {
      moveMarker.waiting = false;
      window.Plotly.restyle($("frontier"), { x: [[across(now.bits)]], y: [[now.kl]] }, [view.markerTrace]);
    });
  }

  const series = (n, colours) => ({ line: { color: colours.lines[n % 7], dash: RecompileCharts.DASHES[n % 7], width: 2 }, marker: { symbol: RecompileCharts.SYMBOLS[n % 7], size: 7, color: colours.lines[n % 7] } });

  function drawTrust() {
    const colours = theme();
    const found = view.data.measured.filter((one) => one.predicted_kl_nats > 0 && one.kl_nats > 0);
    const all = found.flatMap((one) => [one.predicted_kl_nats, one.kl_nats]);
    const ends = all.length ? [Math.min(...all) / 1.6, Math.max(...all) * 1.6] : [0.01, 1];
    const group = (name, list, n, symbol) => ({ name, mode: "markers+text", x: list.map((one) => one.predicted_kl_nats), y: list.map((one) => one.kl_nats),
      error_x: { type: "data", array: list.map((one) => one.predicted_std_error ?? 0), thickness: 1.2, width: 3, color: colours.lines[n] }, error_y: { type: "data", array: list.map((one) => one.std_error ?? 0), thickness: 1.2, width: 3, color: colours.lines[n] },
      text: list.map((one) => plain(one.name, 20)), textposition: "bottom right", textfont: { color: colours.ink, size: 11.5 }, hoverinfo: "text",
      hovertext: list.map((one) => `${plain(one.name)}<br>predicted ${withError(one.predicted_kl_nats, one.predicted_std_error)}<br>measured ${withError(one.kl_nats, one.std_error)}<br>measured / predicted ${digits(one.kl_nats / one.predicted_kl_nats, 2)}`), marker: mark(colours.lines[n], symbol, 9) });
    draw("trust", [
      { name: "equal", mode: "lines", x: ends, y: ends, line: { color: colours.quiet, dash: "dash", width: 1.5 }, hoverinfo: "skip", showlegend: false },
      group("uniform builds", found.filter((one) => one.uniform !== null), 1, "square"), group("mixes", found.filter((one) => one.uniform === null), 2, "diamond"),
    ], layout(colours, logAxis(colours, "predicted KL, nats per token"), logAxis(colours, "measured KL, nats per token"), { legend: { x: 0.02, y: 1, bgcolor: "rgba(0,0,0,0)" } }));
    chartTable("trust", ["build", "predicted KL", "measured KL", "measured / predicted"], found.map((one) => [short(one.name, 60), withError(one.predicted_kl_nats, one.predicted_std_error), withError(one.kl_nats, one.std_error), digits(one.kl_nats / one.predicted_kl_nats, 2)]), `Predicted against measured KL of ${found.length} builds.`);
  }

  function drawTokens() {
    const colours = theme();
    const found = view.data.measured.filter((one) => one.histogram);
    const traces = found.map((one, n) => {
      const { edges_log10: [low, high], counts, below, above } = one.histogram;
      const all = counts.reduce((a, b) => a + b, below + above) || 1;
      const width = (high - low) / counts.length;
      return { name: plain(one.name, 24), mode: "lines", line: { ...series(n, colours).line, shape: "hvh" }, x: counts.map((_, k) => 10 ** (low + (k + 0.5) * width)), y: counts.map((count) => 100 * count / all),
        hoverinfo: "text", hovertext: counts.map((count, k) => `${plain(one.name)}<br>KL ${(10 ** (low + k * width)).toPrecision(2)} to ${(10 ** (low + (k + 1) * width)).toPrecision(2)}<br>${digits(100 * count / all, 2)} % of tokens`) };
    });
    draw("tokens", traces, layout(colours, logAxis(colours, "KL of one token, nats", { dtick: 2, exponentformat: "power", tickformat: "" }), axis(colours, "% of tokens per fifth of a decade", { rangemode: "tozero" }), { legend: { x: 0.01, y: 1, bgcolor: "rgba(0,0,0,0)" } }));
    chartTable("tokens", ["build", "median", "90th percentile", "99th percentile", "largest", "under 1e-8"], view.data.measured.map((one) => [short(one.name, 60), ...["median", "p90", "p99", "max"].map((name) => klText(one.quantiles[name])), one.histogram ? String(one.histogram.below) : "–"]),
      found.length ? `Distribution of the KL of single tokens for ${found.length} builds.` : "These reports hold no per-token counts; a newer model_diff --json does.");
  }

  function drawConfidence() {
    const colours = theme();
    const traces = view.data.measured.map((one, n) => {
      const bins = one.confidence.filter((bin) => bin.tokens && bin.kl_mean > 0);
      return { name: plain(one.name, 24), mode: "lines+markers", ...series(n, colours), x: bins.map((bin) => (bin.low + bin.high) / 2), y: bins.map((bin) => bin.kl_mean), hoverinfo: "text",
        hovertext: bins.map((bin) => `${plain(one.name)}<br>reference's top probability ${bin.low} to ${bin.high}<br>mean KL ${klText(bin.kl_mean)}, median ${klText(bin.kl_median)}<br>${digits(100 * bin.share, 1)} % of tokens`) };
    });
    draw("confidence", traces, layout(colours, axis(colours, "reference's highest probability", { range: [0, 1] }), logAxis(colours, "mean KL, nats"), { legend: { orientation: "h", y: -0.25 } }));
    const edges = view.data.measured[0].confidence;
    chartTable("confidence", ["build", ...edges.map((bin) => `${bin.low} to ${bin.high}`)], view.data.measured.map((one) => [short(one.name, 60), ...one.confidence.map((bin) => klText(bin.kl_mean))]), "Mean KL by the reference's confidence.");
  }

  function drawDrift() {
    if (!window.Plotly) return;
    const colours = theme();
    const cosine = document.querySelector("#drift-kind input:checked").value === "cosine";
    const value = (stage) => (cosine ? stage.cosine_error : stage.sqnr_db);
    const traces = view.data.measured.map((one, n) => {
      const stages = one.drift.map((stage, place) => ({ ...stage, place })).filter((stage) => value(stage) !== null && (!cosine || value(stage) > 0));
      return { name: plain(one.name, 24), mode: "lines", ...series(n, colours), x: stages.map((stage) => stage.place), y: stages.map(value), hoverinfo: "text",
        hovertext: stages.map((stage) => `${plain(one.name)}<br>after ${plain(stage.name)}<br>SQNR ${stage.sqnr_db === null ? "–" : digits(stage.sqnr_db, 1)} dB, cosine error ${klText(stage.cosine_error)}`) };
    });
    draw("drift", traces, layout(colours, axis(colours, "stage: embedding, layers, norm"), cosine ? logAxis(colours, "cosine error") : axis(colours, "SQNR, dB"), { legend: { orientation: "h", y: -0.25 } }));
    const names = view.data.measured[0]?.drift ?? [];
    chartTable("drift", ["after", ...view.data.measured.map((one) => short(one.name, 24))], names.map((stage, n) => [short(stage.name, 60), ...view.data.measured.map((one) => (one.drift[n] ? (cosine ? klText(one.drift[n].cosine_error) : one.drift[n].sqnr_db === null ? "–" : `${digits(one.drift[n].sqnr_db, 1)} dB`) : "–"))]), "Drift of hidden states by layer.");
  }

  start();
  return { state, now, view, recipeText, compareText, setValue(unit, value) {
    Object.assign(state, { unit, value });
    syncControls();
    solve();
    remember();
  } };
})();
