/* The greedy solver of recompile/optimize/greedy.py on flat arrays, step for step: same sums, same order of ties, so
   that the page and `model_optimize --solver greedy` choose the same source for every group. Needs no DOM and no
   library; runs in a browser and in node. Bits are whole numbers below 2^53, costs nats per token. */
"use strict";

const RecompileSolver = (() => {
  const EXCHANGE_WORK = 4000000; // moves looked at in all exchanges together, as in greedy.py

  /* The exactly rounded sum of finite numbers, as Python's math.fsum (Shewchuk, "Adaptive precision floating-point
     arithmetic", 1997: partial sums that do not overlap, rounded once at the end). */
  function exactSum(values) {
    const partials = [];
    for (let n = 0; n < values.length; n++) {
      let x = values[n];
      if (x === 0) continue;
      let kept = 0;
      for (let p = 0; p < partials.length; p++) {
        let y = partials[p];
        if (Math.abs(x) < Math.abs(y)) [x, y] = [y, x];
        const high = x + y;
        const low = y - (high - x);
        if (low !== 0) partials[kept++] = low;
        x = high;
      }
      partials.length = kept;
      partials.push(x);
    }
    let at = partials.length - 1;
    if (at < 0) return 0;
    let high = partials[at];
    let low = 0;
    while (at > 0) {
      const x = high;
      const y = partials[--at];
      high = x + y;
      low = y - (high - x);
      if (low !== 0) break;
    }
    // halfway cases round to even of the exact sum: what lies below decides
    if (at > 0 && ((low < 0 && partials[at - 1] < 0) || (low > 0 && partials[at - 1] > 0))) {
      const twice = low * 2;
      const x = high + twice;
      if (twice === x - high) high = x;
    }
    return high;
  }

  /* -1, 0, 1 in order of code points, as Python compares text (JavaScript compares UTF-16 units). */
  function compareText(left, right) {
    const a = Array.from(left);
    const b = Array.from(right);
    for (let n = 0; n < Math.min(a.length, b.length); n++) {
      const difference = a[n].codePointAt(0) - b[n].codePointAt(0);
      if (difference) return Math.sign(difference);
    }
    return Math.sign(a.length - b.length);
  }

  /* What a problem looks like to the solver. Every change of the constraints needs a new table, a new budget does not.

     problem: {labels: [text], first: [groups + 1], source: [options], bits: [options], cost: [options], fixedBits}
              the options of group g are first[g] .. first[g + 1] - 1; source numbers the labels
     allowed: [options] truthy where an option may be taken; leave out for all
     Throws an Error with .group where a group is left without an option that has a finite cost. */
  function buildTable(problem, allowed) {
    const rank = new Int32Array(problem.labels.length);
    problem.labels
      .map((label, index) => ({ label, index }))
      .sort((a, b) => compareText(a.label, b.label))
      .forEach((entry, place) => { rank[entry.index] = place; });
    const groups = problem.first.length - 1;
    const { source, bits, cost } = problem;
    const option = []; // of the problem, efficient ones only: bits rise and costs fall within a group
    const first = new Int32Array(groups + 1);
    const hulls = [];
    let fewest = 0;
    let most = 0;
    for (let group = 0; group < groups; group++) {
      const offered = [];
      for (let index = problem.first[group]; index < problem.first[group + 1]; index++) {
        if ((!allowed || allowed[index]) && Number.isFinite(cost[index])) offered.push(index);
      }
      if (!offered.length) {
        const error = new Error("no source is left");
        error.group = group;
        throw error;
      }
      offered.sort((a, b) => bits[a] - bits[b] || cost[a] - cost[b] || rank[source[a]] - rank[source[b]]);
      fewest += bits[offered[0]];
      most += bits[offered[offered.length - 1]];
      const start = option.length;
      for (const index of offered) {
        if (option.length === start || cost[index] < cost[option[option.length - 1]]) option.push(index);
      }
      first[group + 1] = option.length;
      hulls.push(lowerHull(option, start, bits, cost));
    }
    const table = {
      problem, first, hulls, fewest, most,
      option: Int32Array.from(option),
      bits: Float64Array.from(option, (index) => bits[index]),
      cost: Float64Array.from(option, (index) => cost[index]),
    };
    table.order = upgradeOrder(table);
    return table;
  }

  /* Places in the table of the options on the lower convex hull of (bits, cost). */
  function lowerHull(option, start, bits, cost) {
    const hull = [];
    for (let index = start; index < option.length; index++) {
      while (hull.length > 1) {
        const low = option[hull[hull.length - 2]];
        const high = option[hull[hull.length - 1]];
        const next = option[index];
        // high stays only if the way to it saves more per bit than the way from it
        if ((cost[low] - cost[high]) * (bits[next] - bits[high]) > (cost[high] - cost[next]) * (bits[high] - bits[low])) break;
        hull.pop();
      }
      hull.push(index);
    }
    return hull;
  }

  /* All hull upgrades in the order in which greedy.py's heap gives them out while everything fits: KL saved per bit
     falls; ties: fewer bits, then the earlier group. Leaving a group out changes nothing in the order of the others,
     so one order serves every budget. */
  function upgradeOrder(table) {
    const count = table.hulls.reduce((sum, hull) => sum + hull.length - 1, 0);
    const order = {
      group: new Int32Array(count), place: new Int32Array(count), added: new Float64Array(count),
      slope: new Float64Array(count),
    };
    const next = new Int32Array(table.hulls.length).fill(1);
    const slope = new Float64Array(table.hulls.length);
    const added = new Float64Array(table.hulls.length);
    const look = (group) => {
      const hull = table.hulls[group];
      const low = hull[next[group] - 1];
      const high = hull[next[group]];
      added[group] = table.bits[high] - table.bits[low];
      slope[group] = (table.cost[high] - table.cost[low]) / added[group];
    };
    const before = (a, b) => slope[a] !== slope[b] ? slope[a] < slope[b]
      : added[a] !== added[b] ? added[a] < added[b] : a < b;
    const heap = [];
    const sink = (at) => {
      const group = heap[at];
      for (;;) {
        let child = 2 * at + 1;
        if (child >= heap.length) break;
        if (child + 1 < heap.length && before(heap[child + 1], heap[child])) child++;
        if (!before(heap[child], group)) break;
        heap[at] = heap[child];
        at = child;
      }
      heap[at] = group;
    };
    table.hulls.forEach((hull, group) => {
      if (hull.length > 1) {
        look(group);
        heap.push(group);
      }
    });
    for (let at = (heap.length >> 1) - 1; at >= 0; at--) sink(at);
    for (let n = 0; n < count; n++) {
      const group = heap[0];
      order.group[n] = group;
      order.place[n] = table.hulls[group][next[group]];
      order.added[n] = added[group];
      order.slope[n] = slope[group];
      if (++next[group] < table.hulls[group].length) {
        look(group);
      } else {
        const last = heap.pop();
        if (!heap.length) continue;
        heap[0] = last;
      }
      sink(0);
    }
    return order;
  }

  /* [fewest, most] bits that a choice can take, fixed bits included. */
  function reachableRange(table) {
    return [table.problem.fixedBits + table.fewest, table.problem.fixedBits + table.most];
  }

  /* The choice of solve_greedy within budgetBits (fixed bits included):
     {option: [groups] numbers of the problem's options, bits, cost, gap, budgetBits}. Throws a RangeError outside the
     reachable range. */
  function solve(table, budgetBits) {
    const [fewest, most] = reachableRange(table);
    if (!(budgetBits >= fewest && budgetBits <= most)) {
      throw new RangeError(`budget ${budgetBits} bits; reachable range: ${fewest} to ${most} bits`);
    }
    const groups = table.hulls.length;
    const chosen = Int32Array.from(table.hulls, (hull) => hull[0]);
    let left = budgetBits - table.problem.fixedBits;
    for (let group = 0; group < groups; group++) left -= table.bits[chosen[group]];
    const passed = new Uint8Array(groups);
    let multiplier = 0;
    const { order } = table;
    for (let n = 0; n < order.group.length; n++) {
      const group = order.group[n];
      if (passed[group]) continue;
      if (order.added[n] > left) { // later upgrades of this group start from this one
        multiplier = multiplier || -order.slope[n];
        passed[group] = 1;
        continue;
      }
      chosen[group] = order.place[n];
      left -= order.added[n];
    }
    const reduced = reducedCosts(table, multiplier);
    left = exchange(table, chosen, reduced, multiplier, left);
    const option = Int32Array.from(chosen, (index) => table.option[index]);
    return {
      option, budgetBits,
      bits: budgetBits - left,
      cost: exactSum(Float64Array.from(chosen, (index) => table.cost[index])),
      gap: gapOf(chosen, reduced, multiplier, left),
    };
  }

  /* cost + multiplier * bits of each option above the least of its group, nats per token. */
  function reducedCosts(table, multiplier) {
    const reduced = new Float64Array(table.bits.length);
    for (let group = 0; group < table.hulls.length; group++) {
      const start = table.first[group];
      const end = table.first[group + 1];
      let least = Infinity;
      for (let index = start; index < end; index++) {
        reduced[index] = (table.cost[index] - table.cost[start]) + multiplier * (table.bits[index] - table.bits[start]);
        if (reduced[index] < least) least = reduced[index];
      }
      for (let index = start; index < end; index++) reduced[index] -= least;
    }
    return reduced;
  }

  function gapOf(chosen, reduced, multiplier, left) {
    const terms = [];
    for (let group = 0; group < chosen.length; group++) {
      if (reduced[chosen[group]] !== 0) terms.push(reduced[chosen[group]]);
    }
    return exactSum(terms) + multiplier * left;
  }

  /* Improve `chosen` in place: the best upgrade, or downgrade and upgrade, that fits, until none lowers the cost.
     Only options whose reduced cost is below the gap are tried. Returns the bits left. */
  function exchange(table, chosen, reduced, multiplier, left) {
    let work = 0;
    for (;;) {
      const gap = gapOf(chosen, reduced, multiplier, left);
      const ups = [];
      const downs = [];
      let targets = 0;
      for (let group = 0; group < chosen.length; group++) {
        const now = chosen[group];
        for (let index = table.first[group]; index < table.first[group + 1]; index++) {
          if (!(reduced[index] < gap)) continue;
          targets++;
          const added = table.bits[index] - table.bits[now];
          if (added === 0) continue;
          (added > 0 ? ups : downs).push({ index, group, added, saved: table.cost[now] - table.cost[index] });
        }
      }
      work += targets;
      if (!targets || work > EXCHANGE_WORK) return left;
      const moves = bestExchange(ups, downs, left);
      if (!moves) return left;
      for (const move of moves) {
        chosen[move.group] = move.index;
        left -= move.added;
      }
    }
  }

  /* One upgrade within `left` bits, or one downgrade and one upgrade in two groups: what saves most.
     Ties: fewer bits, then the move found first in the order (bits added, group). */
  function bestExchange(ups, downs, left) {
    if (!ups.length) return null;
    ups.sort((a, b) => a.added - b.added || b.saved - a.saved || a.group - b.group);
    downs.sort((a, b) => a.added - b.added || a.group - b.group);
    // best[k], other[k]: the upgrade that saves most among the first k, and the one of another group than that
    const best = [-1];
    const other = [-1];
    let top = -1;
    let second = -1;
    ups.forEach((up, place) => {
      if (top < 0 || up.saved > ups[top].saved) {
        if (top >= 0 && ups[top].group !== up.group) second = top;
        top = place;
      } else if (up.group !== ups[top].group && (second < 0 || up.saved > ups[second].saved)) {
        second = place;
      }
      best.push(top);
      other.push(second);
    });
    const within = (room) => { // how many upgrades add at most `room` bits
      let low = 0;
      let high = ups.length;
      while (low < high) {
        const middle = (low + high) >> 1;
        if (ups[middle].added <= room) low = middle + 1;
        else high = middle;
      }
      return low;
    };
    let found = null;
    let foundGain = 0;
    let foundBits = 0;
    const single = best[within(left)];
    if (single >= 0) {
      found = [ups[single]];
      foundGain = ups[single].saved;
      foundBits = ups[single].added;
    }
    for (const down of downs) {
      const limit = within(left - down.added);
      let up = best[limit];
      if (up >= 0 && ups[up].group === down.group) up = other[limit];
      if (up < 0) continue;
      const total = ups[up].saved + down.saved;
      if (total <= 1e-12 * ups[up].saved) continue; // rounding noise is not a gain
      const bits = down.added + ups[up].added;
      if (!found || total > foundGain || (total === foundGain && bits < foundBits)) {
        found = [down, ups[up]];
        foundGain = total;
        foundBits = bits;
      }
    }
    return found;
  }

  /* All hull solutions, cheapest first: {bits: [], cost: [], savedPerBit: []}; bits with the fixed ones. */
  function path(table) {
    const start = table.hulls.map((hull) => hull[0]);
    let bits = table.problem.fixedBits;
    for (const index of start) bits += table.bits[index];
    let cost = exactSum(start.map((index) => table.cost[index]));
    const points = { bits: [bits], cost: [cost], savedPerBit: [Infinity] };
    let rounding = 0; // Neumaier's compensation
    const now = Int32Array.from(start);
    for (let n = 0; n < table.order.group.length; n++) {
      const group = table.order.group[n];
      const index = table.order.place[n];
      const change = table.cost[index] - table.cost[now[group]];
      now[group] = index;
      const total = cost + change;
      rounding += Math.abs(cost) >= Math.abs(change) ? (cost - total) + change : (change - total) + cost;
      bits += table.order.added[n];
      cost = total;
      points.bits.push(bits);
      points.cost.push(cost + rounding);
      points.savedPerBit.push(-table.order.slope[n]);
    }
    return points;
  }

  /* The smallest choice met by bisection whose cost is at most maxCost, as frontier.solve_for_cost with solve_greedy.
     Throws a RangeError where even the least cost is above it. */
  function solveForCost(table, maxCost) {
    const points = path(table);
    const last = points.bits.length - 1;
    const enough = points.cost.findIndex((cost) => cost <= maxCost);
    const refuse = () => {
      throw new RangeError(`no choice costs ${maxCost} nats per token; reachable: ${points.cost[last]} to ${points.cost[0]}`);
    };
    if (enough < 0) refuse();
    let best = solve(table, points.bits[enough]);
    if (best.cost > maxCost) best = solve(table, reachableRange(table)[1]); // the path's sums are rounded
    if (best.cost > maxCost) refuse();
    let low = points.bits[0];
    if (enough > 0) {
      const step = Math.floor((points.cost[enough - 1] - maxCost) / points.savedPerBit[enough]);
      low = Math.max(low, points.bits[enough - 1] + step - 1);
    }
    while (low < best.bits) {
      const middle = Math.floor((low + best.bits) / 2);
      const tried = solve(table, middle);
      if (tried.cost <= maxCost) best = tried;
      else low = middle + 1;
    }
    return { ...best, budgetBits: best.bits };
  }

  return { buildTable, compareText, exactSum, path, reachableRange, solve, solveForCost };
})();

if (typeof module !== "undefined") module.exports = RecompileSolver;
