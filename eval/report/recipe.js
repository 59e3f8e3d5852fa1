/* Override files in the page: written with a comment a line, and read with the rules of recompile/recipe.py, so that a
   file that somebody drops in resolves to the same sources. Needs no DOM. */
"use strict";

const RecompileRecipe = (() => {
  // ends of tensor names, as in eval/report/data.py: keys match tensors, a profile names modules
  const TENSOR_ENDINGS = ["weight", "weight_packed", "qweight", "q_weight", "trellis", "weight_scale", "bias"];

  /* ---- writing ---- */

  /* A YAML scalar in double quotes; whatever YAML does not print stands escaped. */
  function quote(text) {
    const escaped = text.replace(/[\\"]/g, "\\$&").replace(
      /[^\x20-\x7E\u00A0-\uD7FF\uE000-\uFFFD\u{10000}-\u{10FFFF}]|[\u2028\u2029\uFEFF]/gu,
      (sign) => `\\u${sign.codePointAt(0).toString(16).padStart(4, "0")}`,
    );
    return `"${escaped}"`;
  }

  function commentText(text) {
    return text.replace(/\s+/g, " ").replace(/[^\x20-\x7E\u00A0-\uD7FF\uE000-\uFFFD\u{10000}-\u{10FFFF}]|\uFEFF/gu, "?");
  }

  /* Keys that may stand for several modules of one layer (all experts of a projection): those that match exactly the
     modules they were made from. key -> numbers of modules. */
  function sharedKeys(modules) {
    const made = new Map();
    modules.forEach((name, number) => {
      const found = /^(.*?\.\d+\.)(.+)$/.exec(name);
      if (!found) return;
      const tail = found[2].split(".").map((word) => (/^\d+$/.test(word) ? "*" : word)).join(".");
      if (tail === found[2]) return;
      const key = `${found[1]}${tail}`;
      if (!made.has(key)) made.set(key, []);
      made.get(key).push(number);
    });
    for (const [key, numbers] of made) {
      const matches = globMatcher(key);
      const prefix = key.slice(0, key.indexOf("*"));
      const matched = modules.reduce((sum, name) => sum + (name.startsWith(prefix) && matches(name) ? 1 : 0), 0);
      if (numbers.length < 2 || matched !== numbers.length) made.delete(key);
    }
    return made;
  }

  /* The override file of a choice, as lines.

     groups:     [{modules: [names], layer: number or null, source: candidate number, comment}]
     candidates: [{source_line, id_yaml}], base: the candidate that needs no line
     header:     comment lines above everything; tail: YAML lines below */
  function write({ groups, candidates, base, header, tail }) {
    const modules = [];
    const owner = [];
    groups.forEach((group, number) => group.modules.forEach((name) => {
      modules.push(name);
      owner.push(number);
    }));
    const keyOf = new Array(modules.length).fill(null); // a shared key; "" where another module has written it
    for (const [key, numbers] of sharedKeys(modules)) {
      const source = groups[owner[numbers[0]]].source;
      if (numbers.every((number) => groups[owner[number]].source === source)) {
        numbers.forEach((number, place) => { keyOf[number] = place ? "" : key; });
      }
    }
    const inGroup = groups.map(() => []);
    modules.forEach((name, number) => {
      if (keyOf[number] !== "") inGroup[owner[number]].push(keyOf[number] ?? name);
    });
    const order = groups.map((_, number) => number).filter((number) => groups[number].source !== base)
      .sort((a, b) => (groups[a].layer ?? Infinity) - (groups[b].layer ?? Infinity) || a - b);
    const rows = [];
    for (const number of order) {
      inGroup[number].forEach((key, place) => {
        const row = `  - {key: ${quote(`${key}.*`)}, source: ${candidates[groups[number].source].id_yaml}}`;
        rows.push([row, place ? "same group" : commentText(groups[number].comment)]);
      });
    }
    const used = new Set(order.map((number) => groups[number].source));
    const width = Math.min(88, Math.max(0, ...rows.slice(0, 5000).map(([row]) => row.length)));
    return [
      ...header.map((line) => `# ${commentText(line)}`),
      used.size ? "sources:" : "sources: []",
      ...candidates.filter((_, number) => used.has(number)).map((candidate) => candidate.source_line),
      rows.length ? "overrides:" : "overrides: []",
      ...rows.map(([row, comment]) => (comment ? `${row.padEnd(width)}  # ${comment}` : row)),
      ...tail,
    ];
  }

  /* ---- reading: the YAML that override files are written in; anything else is refused ---- */

  class RecipeProblem extends Error {}

  function refuse(line, text) {
    throw new RecipeProblem(`line ${line}: ${text}`);
  }

  /* {sources: [{id, model_dir}], overrides: [{key, source}], base}; throws an Error that names the line. */
  function parse(text) {
    const reader = new Reader(text);
    const found = reader.topLevel();
    if (!Array.isArray(found.overrides)) throw new RecipeProblem('no "overrides:" list; is it an override file?');
    const sources = found.sources ?? [];
    for (const source of sources) {
      source.model_dir ??= describe(source);
      if (!source.model_dir) throw new RecipeProblem('an entry without "model_dir"');
    }
    for (const [list, needed] of [[sources, ["id"]], [found.overrides, ["key", "source"]]]) {
      for (const entry of list) {
        for (const name of needed) if (!(name in entry)) throw new RecipeProblem(`an entry without "${name}"`);
      }
    }
    const known = new Set(sources.map((source) => idKey(source.id)));
    for (const line of found.overrides) {
      if (!known.has(idKey(line.source))) throw new RecipeProblem(`unknown source id ${JSON.stringify(line.source)}`);
    }
    return { sources, overrides: found.overrides, base: typeof found.base === "string" ? found.base : null };
  }

  /* What a source that is made on the fly is called where directories are meant: "bits: 4". */
  function describe(entry) {
    return Object.entries(entry).filter(([name]) => name !== "id").map(([name, value]) => `${name}: ${value}`).join(", ");
  }

  function idKey(id) {
    return typeof id === "boolean" ? `number ${Number(id)}` : `${typeof id} ${id}`; // YAML true equals 1, as in Python
  }

  class Reader {
    constructor(text) {
      this.lines = text.replace(/^\uFEFF/, "").split(/\r\n|\r|\n/).map((raw, at) => {
        const content = withoutComment(raw);
        return { at: at + 1, indent: content.length - content.trimStart().length, content: content.trim() };
      }).filter((line) => line.content !== "" && line.content !== "---" && line.content !== "...");
      this.next = 0;
    }

    topLevel() {
      const found = {};
      while (this.next < this.lines.length) {
        const line = this.lines[this.next++];
        const entry = /^("[^"]*"|'[^']*'|[^\s:{}[\],&*#?|>!%@`"'-][^:]*?)\s*:(?:\s+(.*))?$/.exec(line.content);
        if (line.indent || !entry) refuse(line.at, `"${line.content.slice(0, 60)}" is not read here`);
        const name = scalar(entry[1], line.at);
        const inside = (other) => other.indent > 0 || /^- ?/.test(other.content);
        const start = this.next;
        while (this.next < this.lines.length && inside(this.lines[this.next])) this.next++;
        const block = this.lines.slice(start, this.next);
        if (name === "sources" || name === "overrides") {
          found[name] = entry[2] !== undefined ? flow([entry[2], ...block.map((b) => b.content)].join(" "), line.at) : sequence(block, line.at);
          if (!Array.isArray(found[name])) refuse(line.at, `"${name}" is not a list`);
        } else if (name === "base" && entry[2] !== undefined) {
          found.base = entry[2].startsWith("{") ? describe(flow(entry[2], line.at)) : scalar(entry[2], line.at);
        } else if (name === "base" && block.length) {
          found.base = describe(Object.assign({}, ...sequence([{ at: line.at, content: "-" }, ...block], line.at)));
        }
      }
      return found;
    }
  }

  function withoutComment(raw) {
    let quoted = null;
    for (let at = 0; at < raw.length; at++) {
      const sign = raw[at];
      if (quoted) {
        if (quoted === '"' && sign === "\\") at++;
        else if (sign === quoted) quoted = null;
      } else if ((sign === '"' || sign === "'") && (at === 0 || /[\s{[,:]/.test(raw[at - 1]))) {
        quoted = sign;
      } else if (sign === "#" && (at === 0 || /\s/.test(raw[at - 1]))) {
        return raw.slice(0, at);
      }
    }
    return raw;
  }

  /* A block list of mappings: "- {a: 1}" or "- a: 1" with more entries below. */
  function sequence(lines, at) {
    const items = [];
    for (const line of lines) {
      const item = /^-(?:\s+(.*))?$/.exec(line.content);
      if (item) items.push({ at: line.at, parts: item[1] ? [item[1]] : [] });
      else if (items.length) items[items.length - 1].parts.push(line.content);
      else refuse(line.at, "wanted a list entry (- ...)");
    }
    if (!items.length) refuse(at, "an empty value; wanted a list");
    return items.map((item) => {
      if (item.parts[0]?.startsWith("{")) return flow(item.parts.join(" "), item.at);
      const entry = {};
      for (const part of item.parts) {
        const pair = /^("[^"]*"|'[^']*'|[\w-]+)\s*:\s+(.*)$/.exec(part);
        if (!pair) refuse(item.at, `"${part.slice(0, 60)}" is not read here`);
        entry[scalar(pair[1], item.at)] = scalar(pair[2], item.at);
      }
      return entry;
    });
  }

  /* {...} and [...] with scalars in them. */
  function flow(text, line) {
    let at = 0;
    const skip = () => { while (/\s/.test(text[at] ?? "")) at++; };
    const one = (ends) => {
      skip();
      if (text[at] === "{") {
        at++;
        const found = {};
        for (skip(); text[at] !== "}"; skip()) {
          const name = one(":");
          skip();
          if (text[at++] !== ":") refuse(line, 'wanted ":" inside {...}');
          found[name] = one(",}");
          skip();
          if (text[at] === ",") at++;
          else if (text[at] !== "}") refuse(line, "{ without }");
        }
        at++;
        return found;
      }
      if (text[at] === "[") {
        at++;
        const found = [];
        for (skip(); text[at] !== "]"; skip()) {
          found.push(one(",]"));
          skip();
          if (text[at] === ",") at++;
          else if (text[at] !== "]") refuse(line, "[ without ]");
        }
        at++;
        return found;
      }
      const start = at;
      if (text[at] === '"' || text[at] === "'") {
        const sign = text[at++];
        while (at < text.length && text[at] !== sign) {
          if (sign === '"' && text[at] === "\\") at++;
          at++;
          if (sign === "'" && text[at] === "'" && text[at + 1] === "'") at += 2;
        }
        if (at >= text.length) refuse(line, "a quote that is not closed");
        at++;
      } else {
        const ended = () => ends === ":" ? text[at] === ":" && /\s|$/.test(text[at + 1] ?? "") : ends.includes(text[at]);
        while (at < text.length && !ended()) at++;
        if (at >= text.length) refuse(line, "a bracket that is not closed");
      }
      return scalar(text.slice(start, at).trim(), line);
    };
    if (!/^\s*[[{]/.test(text)) refuse(line, `"${text.slice(0, 40)}" is not read here; wanted [...] or {...}`);
    const value = one("");
    skip();
    if (at < text.length) refuse(line, `"${text.slice(at, at + 40)}" after the closing bracket`);
    return value;
  }

  function scalar(text, line) {
    if (text.startsWith('"')) {
      if (!/^"(?:[^"\\]|\\.)*"$/.test(text)) refuse(line, `${text.slice(0, 60)} is not one quoted text`);
      return text.slice(1, -1).replace(/\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)/g, (_, code) => {
        if (/^[xuU]./.test(code)) return String.fromCodePoint(parseInt(code.slice(1), 16));
        const named = { n: "\n", t: "\t", r: "\r", 0: "\0", a: "\x07", b: "\b", e: "\x1b", f: "\f", v: "\v", N: "\x85", _: "\xa0", L: "\u2028", P: "\u2029" };
        return named[code] ?? code;
      });
    }
    if (text.startsWith("'")) {
      if (!/^'(?:[^']|'')*'$/.test(text)) refuse(line, `${text.slice(0, 60)} is not one quoted text`);
      return text.slice(1, -1).replaceAll("''", "'");
    }
    if (/^[&*!|>%@`]/.test(text)) refuse(line, `"${text.slice(0, 30)}": anchors, tags and blocks are not read here`);
    if (/^[-+]?\d+$/.test(text) && !/^[-+]?0\d/.test(text)) return Number(text);
    if (/^[-+]?(\d+\.\d*|\.\d+)([eE][-+]\d+)?$/.test(text)) return Number(text);
    if (/^(true|True|TRUE|yes|Yes|YES|on|On|ON)$/.test(text)) return true;
    if (/^(false|False|FALSE|no|No|NO|off|Off|OFF)$/.test(text)) return false;
    if (/^(~|null|Null|NULL|)$/.test(text)) return null;
    return text;
  }

  /* ---- who wins (design of override files: the directory first mentioned last is asked first) ---- */

  /* name -> whether the whole name matches; `*` alone is special and crosses dots. */
  function globMatcher(key) {
    const literals = key.trim().split(/\*+/);
    if (literals.length === 1) return (name) => name === literals[0];
    const head = literals[0];
    const tail = literals[literals.length - 1];
    const middle = literals.slice(1, -1);
    return (name) => {
      let start = head.length;
      const end = name.length - tail.length;
      if (start > end || !name.startsWith(head) || !name.endsWith(tail)) return false;
      for (const literal of middle) {
        start = name.indexOf(literal, start);
        if (start < 0 || start + literal.length > end) return false;
        start += literal.length;
      }
      return true;
    };
  }

  /* tensor name -> the directory that holds it, null for the base. */
  function resolver(recipe) {
    const directoryOf = new Map(recipe.sources.map((source) => [idKey(source.id), String(source.model_dir)]));
    const merged = new Map(); // a repeated key keeps its first position and takes its last source
    for (const line of recipe.overrides) merged.set(String(line.key), directoryOf.get(idKey(line.source)));
    const mentioned = [...new Set(merged.values())].reverse();
    const patterns = [...merged].map(([key, directory]) => ({ matches: globMatcher(key), directory }));
    return (name) => {
      const found = new Set();
      for (const pattern of patterns) {
        if (!found.has(pattern.directory) && pattern.matches(name)) {
          found.add(pattern.directory);
          if (pattern.directory === mentioned[0]) break;
        }
      }
      return mentioned.find((directory) => found.has(directory)) ?? null;
    };
  }

  const normal = (path) => path.replace(/^(\.\/+)+/, "").replace(/\/+(\.?\/+)*/g, "/").replace(/(.)\/+$/, "$1");
  const lastName = (path) => normal(path).split("/").pop();

  /* The candidate that a directory is, or -1: the same path, or the same last name where one only has it. */
  function candidateOf(directory, candidates) {
    for (const same of [normal, lastName]) {
      const found = candidates.map((candidate, number) => number)
        .filter((number) => same(candidates[number].dir) === same(directory));
      if (found.length) return found.length === 1 ? found[0] : -1;
    }
    return -1;
  }

  /* [groups] candidate numbers, as the recipe decides over candidate `base`; throws an Error that says what cannot be
     predicted. groups: [{name, modules}] */
  function choiceOf(recipe, groups, candidates, base) {
    const directoryOf = resolver(recipe);
    return groups.map((group) => {
      const sources = new Set(group.modules.map((module) => {
        let directory = null;
        for (const ending of TENSOR_ENDINGS) {
          directory = directoryOf(`${module}.${ending}`);
          if (directory !== null) break;
        }
        if (directory === null) return base;
        const candidate = candidateOf(directory, candidates);
        if (candidate < 0) throw new RecipeProblem(`${directory} is none of this profile's sources`);
        return candidate;
      }));
      if (sources.size > 1) throw new RecipeProblem(`takes the modules of ${group.name} from several sources`);
      return [...sources][0];
    });
  }

  return { candidateOf, choiceOf, globMatcher, parse, quote, resolver, write };
})();

if (typeof module !== "undefined") module.exports = RecompileRecipe;
