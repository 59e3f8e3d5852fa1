/* What draws: the grid of layers x modules (own code: a table that keys and screen readers can walk) and the charts
   (plotly). All text goes in as text. */
"use strict";

const RecompileCharts = (() => {
  // cividis (Nuñez, Anderton and Renslow 2018): reads the same with and without colour vision, dark to bright
  const SCALE = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"]
    .map((colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16)));
  // Okabe and Ito's colours, the pale yellow left out; lines also differ by dash and marks
  const LINES = { light: ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000"],
    dark: ["#56b4e9", "#ff9a4d", "#2fd0a5", "#f2a6cf", "#9ad4ff", "#e6b94d", "#ffffff"] };
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "solid", "dash"];
  const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "x", "star", "cross"];

  /* share 0..1 -> {background, ink} */
  function shade(share) {
    const place = Math.min(1, Math.max(0, share)) * (SCALE.length - 1);
    const low = Math.min(SCALE.length - 2, Math.floor(place));
    const rgb = SCALE[low].map((value, n) => Math.round(value + (SCALE[low + 1][n] - value) * (place - low)));
    const light = (0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]) > 118;
    return { background: `rgb(${rgb.join(",")})`, ink: light ? "#111" : "#fff" };
  }

  const gradient = `linear-gradient(90deg, ${SCALE.map((rgb) => `rgb(${rgb.join(",")})`).join(",")})`;

  function make(tag, properties = {}, ...children) {
    const found = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name in found && name !== "style") found[name] = value;
      else found.setAttribute(name, value);
    }
    found.append(...children.filter((child) => child !== null));
    return found;
  }

  function fillTable(table, header, rows) {
    const head = make("thead", {}, make("tr", {}, ...header.map((text) => make("th", { scope: "col" }, text))));
    const body = make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((text) => make("td", {}, text)))));
    table.replaceChildren(head, body);
  }

  /* ---- the grid ---- */

  /* A table of kinds x layers. `cells` maps "kind layer" to any value; `on` is told of what people do:
     look(cell) on hover and focus, act(cells, first, event) on click, drag and Enter, key(cell, letter). */
  class Grid {
    constructor(table, { kinds, layers, cells, layerName }, on) {
      Object.assign(this, { table, on, cells: new Map(), byElement: new Map() });
      const corner = make("th", { scope: "col" }, make("span", { className: "quiet" }, "layer"));
      const top = layers.map((layer, column) => {
        const button = make("button", { type: "button", tabIndex: -1, title: `all of layer ${layerName(layer)}` }, layerName(layer));
        this.header(button, () => this.rows.map((row) => row[column]));
        if (layers.length > 34 && column % 2) button.style.visibility = "hidden";
        return make("th", { scope: "col" }, button);
      });
      this.rows = [];
      const body = kinds.map((kind, row) => {
        const button = make("button", { type: "button", tabIndex: -1, title: `all of ${kind}` }, kind);
        this.header(button, () => this.rows[row]);
        const line = layers.map((layer, column) => {
          const key = `${row} ${column}`;
          const value = cells.get(key);
          const element = make("td", { role: "gridcell", tabIndex: -1 });
          if (!value) element.className = "none";
          const cell = { element, row, column, value, kind, layer, painted: "" };
          this.byElement.set(element, cell);
          if (value) this.cells.set(key, cell);
          return cell;
        });
        this.rows.push(line);
        return make("tr", {}, make("th", { scope: "row" }, button), ...line.map((cell) => cell.element));
      });
      table.replaceChildren(make("thead", {}, make("tr", {}, corner, ...top)), make("tbody", {}, ...body));
      const start = [...this.cells.values()][0];
      if (start) start.element.tabIndex = 0;
      this.focused = start;
      this.listen();
    }

    header(button, cells) {
      const real = () => cells().filter((cell) => cell.value);
      button.addEventListener("click", () => this.on.act(real(), true));
      button.addEventListener("mouseenter", () => real()[0] && this.on.look(real()[0], real()));
    }

    listen() {
      const cellAt = (target) => {
        const found = this.byElement.get(target.closest?.("td"));
        return found?.value ? found : null;
      };
      let dragged = null; // cells of the drag under way
      this.table.addEventListener("pointerdown", (event) => {
        const cell = cellAt(event.target);
        if (!cell || event.button !== 0 || event.pointerType === "touch") return;
        dragged = new Set([cell]);
        this.on.act([cell], true);
      });
      this.table.addEventListener("pointermove", (event) => {
        if (!dragged) return;
        const cell = cellAt(document.elementFromPoint(event.clientX, event.clientY) ?? this.table);
        if (cell && !dragged.has(cell)) {
          dragged.add(cell);
          this.on.act([cell], false);
        }
      });
      window.addEventListener("pointerup", () => { dragged = null; });
      this.table.addEventListener("click", (event) => { // touch: a tap acts, a drag scrolls
        const cell = cellAt(event.target);
        if (cell && event.pointerType === "touch") this.on.act([cell], true);
      });
      this.table.addEventListener("mouseover", (event) => {
        const cell = cellAt(event.target);
        if (cell) this.on.look(cell);
      });
      this.table.addEventListener("focusin", (event) => {
        const cell = cellAt(event.target);
        if (!cell) return;
        this.focused.element.tabIndex = -1;
        cell.element.tabIndex = 0;
        this.focused = cell;
        this.on.look(cell);
      });
      this.table.addEventListener("keydown", (event) => {
        const cell = cellAt(event.target);
        if (!cell || event.ctrlKey || event.metaKey || event.altKey) return;
        const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -Infinity], End: [0, Infinity] }[event.key];
        if (step) {
          this.move(cell, step);
        } else if (event.key === "Enter" || event.key === " ") {
          this.on.act([cell], true);
        } else if (!this.on.key || !this.on.key(cell, event.key)) {
          return;
        }
        event.preventDefault();
      });
    }

    move(cell, [down, right]) {
      if (Math.abs(right) === Infinity) {
        const row = this.rows[cell.row].filter((other) => other.value);
        return (right > 0 ? row[row.length - 1] : row[0]).element.focus();
      }
      let { row, column } = cell;
      do {
        row += down;
        column += right;
      } while (this.rows[row]?.[column] && !this.rows[row][column].value);
      this.rows[row]?.[column]?.element.focus();
    }

    /* describe(cell) -> {text, background, ink, classes, label}; only what changed is touched. */
    paint(describe) {
      for (const cell of this.cells.values()) {
        const { text, background, ink, classes, label } = describe(cell);
        const painted = [text, background, classes, label].join("\n");
        if (painted === cell.painted) continue;
        cell.painted = painted;
        cell.element.textContent = text;
        cell.element.style.background = background;
        cell.element.style.color = ink;
        cell.element.className = classes;
        cell.element.setAttribute("aria-label", label);
      }
    }
  }

  /* ---- plotly ---- */

  /* Plotly reads a little markup in its texts: names must not become any. */
  function plain(text, limit = 48) {
    const short = text.length > limit ? `${text.slice(0, limit - 1)}…` : text;
    return short.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  }

  function theme() {
    const style = getComputedStyle(document.documentElement);
    const value = (name) => style.getPropertyValue(name).trim();
    const dark = document.documentElement.dataset.theme === "dark";
    return { dark, ink: value("--ink"), quiet: value("--quiet"), line: value("--line"), paper: value("--paper"),
      mark: value("--mark"), lines: LINES[dark ? "dark" : "light"], font: style.fontFamily };
  }

  function axis(colours, title, more = {}) {
    return { title: { text: title, font: { size: 12.5 } }, gridcolor: colours.line, linecolor: colours.line, zeroline: false,
      tickfont: { size: 12 }, color: colours.ink, automargin: true, ...more };
  }

  function logAxis(colours, title, more = {}) {
    return axis(colours, title, { type: "log", dtick: "D2", tickformat: "~g", exponentformat: "power", minorloglabels: "none", ...more });
  }

  function layout(colours, xaxis, yaxis, more = {}) {
    return { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 62, r: 12, t: 30, b: 44 }, // the tool bar is above the plot and its legend
      font: { color: colours.ink, family: colours.font, size: 12.5 }, hovermode: "closest",
      hoverlabel: { bgcolor: colours.paper, bordercolor: colours.quiet, font: { color: colours.ink }, align: "left" },
      legend: { x: 1, xanchor: "right", y: 1, bgcolor: "rgba(0,0,0,0)", font: { size: 12 } }, xaxis, yaxis, ...more };
  }

  const CONFIG = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    showSendToCloud: false, topojsonURL: "" };

  function draw(id, traces, shape) {
    return window.Plotly.react(document.getElementById(id), traces, shape, CONFIG);
  }

  async function inflate(id) {
    const text = atob(document.getElementById(id).textContent.trim());
    const bytes = new Uint8Array(text.length);
    for (let at = 0; at < text.length; at++) bytes[at] = text.charCodeAt(at);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  }

  function decode(text, Kind) {
    const raw = atob(text);
    const bytes = new Uint8Array(raw.length);
    for (let at = 0; at < raw.length; at++) bytes[at] = raw.charCodeAt(at);
    return new Kind(bytes.buffer);
  }

  return { DASHES, Grid, SYMBOLS, axis, decode, draw, fillTable, gradient, inflate, layout, logAxis, make, plain, shade, theme };
})();
