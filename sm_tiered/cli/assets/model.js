// What the page was given, as bars, points and areas on an axis of time or of steps.

const STATES = ["acknowledged", "committed", "streamed", "skipped", "failed", "open"];

/** Where a moment of a leg stands on the axis of steps: between its marks. */
function stepAt(leg, time) {
  const marks = leg.marks, first = leg.restored ? leg.restored[0] : 0;
  if (!marks.length) return first;
  const place = lowerBound(marks.length, (i) => marks[i][0], time);
  if (place >= marks.length) return marks[marks.length - 1][1];
  const [t1, s1] = marks[place];
  const [t0, s0] = place ? marks[place - 1] : [leg.ready, Math.min(first, s1)];
  return t1 <= t0 ? s1 : s0 + (s1 - s0) * Math.min(1, Math.max(0, (time - t0) / (t1 - t0)));
}

/** Lanes of bars for one axis. A bar: x0, x1, kind, and what it is of; bars of a lane ascend by x0. */
function lanesOf(data, bySteps) {
  const at = (leg, time) => (bySteps ? stepAt(data.legs[leg], time) : time);
  const lanes = [trainingLane(data, at, bySteps), blockedLane(data, at)];
  data.tiers.forEach((name, tier) => lanes.push(tierLane(data, at, tier, name)));
  for (const lane of lanes) {
    lane.bars.sort((a, b) => a.x0 - b.x0);
    lane.widest = lane.bars.reduce((most, bar) => Math.max(most, bar.x1 - bar.x0), 0);
  }
  return lanes;
}

function trainingLane(data, at, bySteps) {
  const bars = [];
  data.legs.forEach((leg, index) => {
    const add = (from, to, kind) => {
      if (to > from) bars.push({ x0: at(index, from), x1: at(index, to), kind, leg: index, from, to, row: bySteps ? index : 0 });
    };
    const last = leg.marks.length && (leg.end === "finished" || leg.end === "closed") ? leg.marks[leg.marks.length - 1][0] : leg.ended;
    const lost = leg.lost_from === null ? last : Math.min(leg.lost_from, last);
    if (!bySteps) add(leg.began, leg.ready, "restoring");
    add(leg.ready, lost, "kept");
    add(lost, last, "lost");
    if (!bySteps) add(last, leg.ended, "closing");
  });
  return { name: "training", title: bySteps ? "training by leg" : "training", kind: "training", bars, rows: bySteps ? data.legs.length : 1 };
}

function blockedLane(data, at) {
  const bars = [];
  data.saves.forEach((save, index) => {
    const [leg, , time, blocked] = save;
    if (blocked > 0) bars.push({ x0: at(leg, time - blocked), x1: at(leg, time), kind: "blocked", save: index, tall: blocked });
  });
  const tallest = bars.reduce((most, bar) => Math.max(most, bar.tall), 0);
  return { name: "blocked", title: "blocked by saves", kind: "blocked", bars, tallest, rows: 1 };
}

function tierLane(data, at, tier, name) {
  const bars = [];
  data.saves.forEach((save, index) => {
    for (const on of save[6]) {
      if (on[0] !== tier) continue;
      const state = STATES[on[1]], ended = on[3] === null ? Math.max(on[2], data.legs[save[0]].ended) : on[3];
      const saved = at(save[0], save[2]), began = at(save[0], Math.max(on[2], save[2]));
      bars.push({ x0: saved, x1: Math.max(saved, at(save[0], ended)), began: Math.max(saved, began), kind: state, save: index, tier, row: 0 });
    }
  });
  bars.sort((a, b) => a.began - b.began);
  const rows = stack(bars);
  return { name, title: name, kind: tier === data.memory ? "memory" : "durable", tier, bars, rows };
}

/** Give bars that overlap rows of their own, at most three; a few that do may lie over each other. */
function stack(bars) {
  const ends = [-Infinity, -Infinity, -Infinity];
  let rows = 1;
  for (const bar of bars) {
    if (bar.kind === "skipped") continue;
    let row = ends.findIndex((end) => end <= bar.began);
    if (row < 0) row = ends.indexOf(Math.min(...ends));
    ends[row] = bar.x1;
    bar.row = row;
    rows = Math.max(rows, row + 1);
  }
  if (bars.filter((bar) => bar.row).length > bars.length * 0.05) return rows;
  for (const bar of bars) bar.row = 0;
  return 1;
}

/** The windows of work at risk: x0, x1 and what is lost at both ends. */
function riskOf(data, bySteps) {
  return data.windows.map(([leg, from, to, process, node]) => {
    const x0 = bySteps ? stepAt(data.legs[leg], from) : from, x1 = bySteps ? stepAt(data.legs[leg], to) : to;
    return { leg, from, to, x0, x1, process, node };
  });
}

/** Restores and failures: marks that go through all lanes. */
function marksOf(data, bySteps) {
  const marks = data.failures.map((failure) => ({
    x: bySteps ? (failure.reached === null ? 0 : failure.reached) : failure.at,
    kind: failure.kind, failure,
  }));
  data.legs.forEach((leg, index) => {
    if (leg.restored) marks.push({ x: bySteps ? leg.restored[0] : leg.ready, kind: "restore", leg: index });
  });
  return marks.sort((a, b) => a.x - b.x);
}

function extent(data, bySteps) {
  if (!bySteps) return [0, Math.max(data.t1, 1)];
  const steps = data.legs.flatMap((leg) => leg.marks.map((mark) => mark[1]));
  return [0, Math.max(1, ...data.saves.map((save) => save[1]).reduce((most, step) => [Math.max(most[0], step)], [0]),
    steps.reduce((most, step) => Math.max(most, step), 0))];
}
