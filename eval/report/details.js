/* What single reports hold beyond a KL: slices, context lengths, greedy runs, quantized caches, and where the KL comes
   from. A figure stands on the page where at least one report has its numbers; all are drawn by `figure`. */
"use strict";

const RecompileDetails = (() => {
  const { DASHES, SYMBOLS, axis, draw, fillTable, layout, logAxis, make, plain, theme } = RecompileCharts;
  const LABELLED = 4; // points of a scatter that get their name
  const NARROW = 600; // pixels of a window where none gets it
  const BARS = 16;
  const $ = (id) => document.getElementById(id);
  const LEGEND = { legend: { orientation: "h", y: -0.28, x: 0, xanchor: "left" } };

  /* One figure with its heading, chart and table of numbers; made where it is not there yet. */
  function figure(id, { title, text, traces, shape, header, rows, summary }) {
    if (!$(id)) {
      const table = make("table", { className: "plain" });
      $("measured-charts").append(make("figure", {},
        make("figcaption", {}, make("h3", {}, title), make("p", { className: "quiet" }, text)),
        make("div", { className: "chart", id, role: "img" }),
        make("details", { className: "numbers", "data-of": id }, make("summary", {}, "Numbers"), make("div", { className: "scroll" }, table))));
    }
    $(id).setAttribute("aria-label", summary);
    fillTable(document.querySelector(`.numbers[data-of="${id}"] table`), header, rows);
    draw(id, traces, shape);
  }

  const style = (n, colours) => ({ line: { color: colours.lines[n % 7], dash: DASHES[n % 7], width: 2 },
    marker: { symbol: SYMBOLS[n % 7], size: 8, color: colours.lines[n % 7] } });
  const bars = (values, color) => ({ type: "data", array: values.map((value) => value ?? 0), color, thickness: 1.4, width: 3 });

  /* Texts for points of a log-log chart: a point's own where no text is near, in the order given; else "".
     points: [{x, y, text}]; ends: [low, high] of both axes; taken: where texts of other traces stand. */
  function texts(points, ends, taken) {
    const place = (value) => Math.log(value / ends[0]) / Math.log(ends[1] / ends[0]);
    return points.map(({ x, y, text }) => {
      const [right, up] = [place(x), place(y)];
      if (document.documentElement.clientWidth < NARROW || taken.length >= LABELLED || taken.some(([r, u]) => Math.abs(r - right) < 0.34 && Math.abs(u - up) < 0.07)) return "";
      taken.push([right, up]);
      return text;
    });
  }

  /* What all figures share: the reports that have `part`, each with its number among all, so that colours stay. */
  const having = (measured, part) => measured.map((one, n) => ({ one, n })).filter(({ one }) => (Array.isArray(one[part]) ? one[part].length : one[part]));

  /* KL by a name: kinds of text, lengths of context. */
  function slices(id, part, words, measured, tools, colours) {
    const found = having(measured, part);
    if (!found.length) return;
    const { withError, digits, short } = tools;
    const names = [...new Set(found.flatMap(({ one }) => one[part].map((slice) => slice.name)))];
    const traces = found.map(({ one, n }) => ({ name: plain(one.name, 24), ...style(n, colours), mode: words.joined ? "lines+markers" : "markers",
      x: one[part].map((slice) => plain(slice.name, 20)), y: one[part].map((slice) => slice.kl.mean),
      error_y: bars(one[part].map((slice) => slice.kl.std_error), colours.lines[n % 7]), hoverinfo: "text",
      hovertext: one[part].map((slice) => `${plain(one.name)}<br>${plain(slice.name)}: ${slice.rows} rows, ${slice.tokens} tokens<br>KL ${withError(slice.kl.mean, slice.kl.std_error)} nats/token<br>same top token ${digits(100 * slice.same_top.mean, 1)} %`) }));
    const low = Math.min(...traces.flatMap((trace) => trace.y.filter((value) => value > 0)));
    figure(id, { ...words, traces, summary: `${words.title}: ${names.length} parts, ${found.length} builds. The numbers follow.`,
      shape: layout(colours, axis(colours, words.across, { type: "category", categoryorder: "array", categoryarray: names.map((name) => plain(name, 20)) }),
        (Number.isFinite(low) ? logAxis : axis)(colours, "KL, nats per token"), LEGEND),
      header: ["build", words.across, "rows", "tokens", "KL, nats/token", "same top token"],
      rows: found.flatMap(({ one }) => one[part].map((slice) => [short(one.name, 40), slice.name, String(slice.rows), String(slice.tokens), withError(slice.kl.mean, slice.kl.std_error), slice.same_top.mean === null ? "–" : `${digits(100 * slice.same_top.mean, 2)} %`])) });
  }

  function greedy(measured, tools, colours) {
    const found = having(measured, "divergence");
    if (!found.length) return;
    const { digits, short } = tools;
    const percent = (share) => 100 * share;
    const traces = found.map(({ one, n }) => ({ name: plain(one.name, 24), mode: "lines+markers", ...style(n, colours),
      x: one.divergence.survival.map(([count]) => count), y: one.divergence.survival.map(([, share]) => percent(share)), hoverinfo: "text",
      hovertext: one.divergence.survival.map(([count, share]) => `${plain(one.name)}<br>${digits(percent(share), 0)} % of ${one.divergence.prompts} runs are equal after ${count} tokens`) }));
    const points = [...new Set(found.flatMap(({ one }) => one.divergence.survival.map(([count]) => count)))].sort((a, b) => a - b);
    const at = (one, count) => one.divergence.survival.find(([place]) => place === count);
    figure("greedy", { title: "How long greedy runs agree", text: "Share of prompts whose greedy continuation is still the reference's, token for token.", traces,
      summary: `Survival of greedy runs for ${found.length} builds. The numbers follow.`,
      shape: layout(colours, axis(colours, "tokens written", { type: "log", tickvals: points, ticktext: points.map(String) }), axis(colours, "% of runs still equal", { range: [0, 103] }), LEGEND),
      header: ["build", "median", ...points.map((count) => `${count} tokens`)],
      rows: found.map(({ one }) => [short(one.name, 40), one.divergence.median === null ? "half never part" : `after ${one.divergence.median}`, ...points.map((count) => (at(one, count) ? `${digits(percent(at(one, count)[1]), 0)} %` : "–"))]) });
  }

  function caches(measured, tools, colours) {
    const found = having(measured, "cache_sweep");
    if (!found.length) return;
    const { digits, klText, withError, short, sizeText } = tools;
    const traces = found.map(({ one, n }) => {
      const points = one.cache_sweep.filter((point) => point.kl > 0).sort((a, b) => a.bits - b.bits || b.kl - a.kl);
      return { name: plain(one.name, 24), mode: "markers+text", ...style(n, colours), x: points.map((point) => point.bits), y: points.map((point) => point.kl),
        error_y: bars(points.map((point) => point.std_error), colours.lines[n % 7]), text: points.map((point) => (n === found[0].n ? plain(point.name, 16) : "")),
        textposition: points.map((_, place) => (place % 2 ? "bottom right" : "top right")), textfont: { color: colours.ink, size: 11.5 }, hoverinfo: "text",
        hovertext: points.map((point) => `${plain(one.name)}<br>cache ${plain(point.name)} (${plain(point.engine)})<br>${digits(point.bits, 2)} bits a value, ${sizeText(point.bytes_per_token)} a token<br>KL ${withError(point.kl, point.std_error)}, ${withError(point.difference, point.difference_error)} more than without`) };
    });
    const ends = [Math.min(...traces.flatMap((trace) => trace.x)) - 0.4, Math.max(...traces.flatMap((trace) => trace.x)) + 1.6];
    const heights = [...traces.flatMap((trace) => trace.y), ...found.map(({ one }) => one.kl_nats).filter((kl) => kl > 1e-6)];
    const range = [Math.log10(Math.min(...heights) / 1.6), Math.log10(Math.max(...heights) * 1.8)]; // room for texts
    const floors = found.filter(({ one }) => one.kl_nats > 1e-6).map(({ one, n }) => ({ name: plain(`${one.name}, no cache`, 30), mode: "lines", x: ends, y: [one.kl_nats, one.kl_nats],
      line: { color: colours.lines[n % 7], dash: "dot", width: 1.4 }, hoverinfo: "text", hovertext: `${plain(one.name)} with its cache as it is: ${klText(one.kl_nats)}` }));
    figure("caches", { title: "What a quantized cache costs", text: "The same build through caches of fewer bits. Dotted: its KL with keys and values as they are.", traces: [...floors, ...traces],
      summary: `KL through ${found[0].one.cache_sweep.length} caches. The numbers follow.`,
      shape: layout(colours, axis(colours, "bits a value, scales included", { range: ends }), logAxis(colours, "KL, nats per token", { range }), LEGEND),
      header: ["build", "cache", "bits a value", "a token", "KL, nats/token", "more than without", "99th percentile", "same top token"],
      rows: found.flatMap(({ one }) => one.cache_sweep.map((point) => [short(one.name, 40), point.name, digits(point.bits, 2), sizeText(point.bytes_per_token), withError(point.kl, point.std_error), withError(point.difference, point.difference_error), klText(point.p99), `${digits(100 * point.same_top, 2)} %`])) });
  }

  /* The groups of every build: against noise of the size of their errors where that was measured, else the largest. */
  function attribution(measured, tools, colours) {
    const found = having(measured, "attribution");
    if (!found.length) return;
    const noise = found.filter(({ one }) => one.attribution.total_noise !== null);
    const { digits, klText, short } = tools;
    const rows = found.flatMap(({ one }) => one.attribution.groups.slice(0, 60).map((group) => [short(one.name, 40), short(group.group, 70), digits(group.bits_per_weight, 2), `${digits(100 * group.relative_error, 1)} %`, klText(group.kl), klText(group.noise), group.kl > 0 && group.noise > 0 ? digits(group.kl / group.noise, 2) : "–"]));
    const header = ["build", "group", "bpw", "error / weights", "KL by itself", "noise of that size", "KL / noise"];
    const summary = `KL of single groups of ${found.length} builds. The numbers follow.`;
    const title = "Where the KL comes from";
    if (!noise.length) return bySize(found, { title, header, rows, summary }, tools, colours);
    const shown = (one) => one.attribution.groups.filter((group) => group.kl > 0 && group.noise > 0);
    const all = noise.flatMap(({ one }) => shown(one).flatMap((group) => [group.kl, group.noise]));
    if (!all.length) return bySize(found, { title, header, rows, summary }, tools, colours);
    const ends = [Math.min(...all) / 1.5, Math.max(...all) * 1.5];
    const taken = [];
    const traces = noise.map(({ one, n }) => {
      const groups = shown(one);
      const named = texts(groups.map((group) => ({ x: group.noise, y: group.kl, text: plain(tools.nickname(group.group), 24) })), ends, taken);
      return { name: plain(one.name, 24), mode: "markers+text", marker: { ...style(n, colours).marker, size: 7, opacity: 0.85 }, x: groups.map((group) => group.noise), y: groups.map((group) => group.kl),
        text: named, textposition: groups.map((group) => (Math.log(group.noise / ends[0]) > 0.45 * Math.log(ends[1] / ends[0]) ? "middle left" : "middle right")), textfont: { color: colours.ink, size: 11 }, hoverinfo: "text",
        hovertext: groups.map((group) => `${plain(one.name)}<br>${plain(group.group, 80)}<br>KL by itself ${klText(group.kl)}, noise of that size ${klText(group.noise)}<br>KL / noise ${digits(group.kl / group.noise, 2)}, error ${digits(100 * group.relative_error, 1)} % of the weights`) };
    });
    figure("attribution", { title, text: "Each group by itself in the reference. Right: sensitive to any error of that size. Above the dashed line: rounded worse than noise would be; below: better.", header, rows, summary,
      traces: [{ name: "as noise", mode: "lines", x: ends, y: ends, line: { color: colours.quiet, dash: "dash", width: 1.5 }, hoverinfo: "skip", showlegend: false }, ...traces],
      shape: layout(colours, logAxis(colours, "KL of noise as large as the error (sensitivity)", { dtick: 1 }), logAxis(colours, "KL of its own error", { dtick: 1 }), LEGEND) });
  }

  function bySize(found, words, tools, colours) {
    const { klText } = tools;
    const names = [...new Set(found.flatMap(({ one }) => one.attribution.groups.slice(0, BARS).map((group) => group.group)))].slice(0, BARS);
    const value = (one, name) => one.attribution.groups.find((group) => group.group === name)?.kl ?? null;
    const traces = found.map(({ one, n }) => ({ name: plain(one.name, 24), mode: "markers", ...style(n, colours), x: names.map((name) => value(one, name)), y: names.map((name) => plain(tools.nickname(name), 26)),
      hoverinfo: "text", hovertext: names.map((name) => `${plain(one.name)}<br>${plain(name, 80)}<br>KL by itself ${klText(value(one, name))}`) }));
    figure("attribution", { ...words, text: `Each group by itself in the reference; the ${names.length} most expensive.`, traces,
      shape: layout(colours, logAxis(colours, "KL by itself, nats per token"), axis(colours, "", { type: "category", autorange: "reversed", dtick: 1, tickfont: { size: 10.5 } }), { ...LEGEND, margin: { l: 150, r: 12, t: 30, b: 44 } }) });
  }

  /* measured: of the page's data; tools: what figures are written with. Call again for another theme. */
  function drawAll(measured, tools) {
    const colours = theme();
    slices("origins", "by_origin", { title: "By kind of text", text: "KL on rows of each kind, ± one standard error over its rows.", across: "kind of row", joined: false }, measured, tools, colours);
    slices("positions", "by_position", { title: "By length of context", text: "KL of tokens by how many tokens they see before them.", across: "tokens of context", joined: true }, measured, tools, colours);
    greedy(measured, tools, colours);
    caches(measured, tools, colours);
    attribution(measured, tools, colours);
  }

  return { draw: drawAll };
})();
