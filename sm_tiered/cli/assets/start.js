// Reads what the page was given and puts everything in its place.

const byId = (id) => document.getElementById(id);

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function swatch(kind) {
  const shapes = {
    bar: '<rect x="1" y="3" width="12" height="8" rx="2" fill="C"/>', area: '<path d="M1 12 L12 3 L12 12 Z" fill="C"/>',
    line: '<path d="M7 1 V13" stroke="C" stroke-width="1.8"/><path d="M3 2 H11 L7 7 Z" fill="C"/>',
    up: '<path d="M7 1 V13" stroke="C" stroke-width="1.6" stroke-dasharray="2 2"/><path d="M3 7 H11 L7 2 Z" fill="C"/>',
    hollow: '<path d="M7 2 L12 7 L7 12 L2 7 Z" fill="none" stroke="C" stroke-width="1.8"/>', cross: '<path d="M3 3 L11 11 M11 3 L3 11" stroke="C" stroke-width="2.2"/>',
    hatched: '<rect x="1" y="3" width="12" height="8" rx="2" fill="C" opacity=".35"/><path d="M1 11 L9 3 M5 11 L13 3" stroke="C" stroke-width="1.6"/>',
  };
  const holder = document.createElement("template");
  holder.innerHTML = `<svg width="14" height="14" viewBox="0 0 14 14" aria-hidden="true">${shapes[kind[0]].replaceAll("C", `var(--${kind[1]})`)}</svg>`;
  return holder.content.firstChild;
}

function key(kind, text, value) {
  const made = element("span", undefined, "key");
  made.append(swatch(kind), text);
  if (value !== undefined) made.append(" ", element("b", value));
  return made;
}

function figure(name, value, more) {
  const made = element("div", undefined, "figure");
  made.append(element("div", name, "name"), element("div", value, "value"), element("div", more, "more"));
  return made;
}

function showFigures(data) {
  const f = data.figures, kinds = (kind) => data.failures.filter((one) => one.kind === kind).length;
  const done = data.saves.length, worst = data.windows.reduce((most, [, from, to, , node]) => Math.max(most, node + to - from), 0);
  const durable = data.saves.filter((save) => save[6].some((on) => on[1] === 1 || on[1] === 2)).length;
  const told = [["process", "process"], ["node", "node"], ["preempted", "preempted"]].filter(([kind]) => kinds(kind)).map(([kind, word]) => `${kinds(kind)} ${word}`);
  byId("figures").append(
    figure("Goodput", f.share === null ? "?" : percent(f.share), `${span(f.kept)} of ${span(f.wall)}`),
    figure("Saves", count(done), `${count(durable)} of them durable`),
    figure("Blocked by saves", span(f.blocked), done ? `${percent(f.blocked / Math.max(f.wall, 1e-9))}, ${span(f.blocked / done)} a save` : "no saves"),
    figure("Failures", count(data.failures.length), told.join(", ") + (f.mtbf ? ` · every ${span(f.mtbf)}` : told.length ? "" : "none seen")),
    figure("Lost to going back", span(f.lost), plural(f.lost_steps, "step") + " done again"),
    figure("Most ever at risk", span(worst), "had the node been lost"),
  );
  const names = [["kept", "training"], ["lost", "lost and done again"], ["blocked", "blocked by saves"], ["restoring", "restoring"], ["closing", "closing"], ["down", "down between launches"]];
  for (const [name, words] of names) {
    if (!(f[name] > 0)) continue;
    const part = element("span");
    part.style.flexGrow = f[name] / f.wall;
    part.style.background = `var(--${name})`;
    byId("split").append(part);
    byId("split-keys").append(key(["bar", name], words, `${span(f[name])} · ${percent(f[name] / f.wall)}`));
  }
}

function showSummary(data) {
  document.title = `${data.namespace}: checkpoints`;
  byId("namespace").textContent = data.namespace;
  const from = clock(data.t0), to = clock(data.t0 + data.t1);
  const until = from.date === to.date ? to.time : `${day(to.date)} ${to.time}`;
  byId("summary").textContent = `${day(from.date)} ${from.date.slice(0, 4)} ${from.time} – ${until} UTC · ${plural(data.launches, "launch").replace("launchs", "launches")} · tiers ${data.tiers.join(" → ")}`;
}

function showLegend(data) {
  const has = (state) => data.saves.some((save) => save[6].some((on) => on[1] === state)), durable = data.tiers.length > (data.memory === null ? 0 : 1);
  const items = [[["bar", "kept"], "training"], [["hatched", "lost"], "lost"], [["bar", "restoring"], "restoring"], [["bar", "blocked"], "blocked (height: how long)"]];
  if (data.memory !== null) items.push([["bar", "memory"], "copied → whole in memory"]);
  if (durable) items.push([["bar", "drain"], "upload → committed"]);
  if (has(3)) items.push([["hollow", "skipped"], "left out"]);
  if (has(4)) items.push([["cross", "failed"], "failed"]);
  if (data.failures.some((one) => one.kind === "process")) items.push([["line", "failed"], "processes died"]);
  if (data.failures.some((one) => one.kind === "node")) items.push([["line", "node"], "node lost"]);
  if (data.failures.some((one) => one.kind === "preempted")) items.push([["line", "skipped"], "preempted"]);
  if (data.legs.some((leg) => leg.restored)) items.push([["up", "memory"], "restored"]);
  items.push([["area", "memory"], "lost if the processes died"]);
  if (durable) items.push([["area", "drain"], "lost if the node were lost"]);
  byId("legend").append(...items.map(([kind, text]) => key(kind, text)));
}

function table(target, heads, rows) {
  const top = target.createTHead().insertRow();
  for (const head of heads) top.append(element("th", head));
  const body = target.createTBody();
  for (const row of rows) {
    const line = body.insertRow();
    row.forEach((cell) => line.append(cell instanceof Node ? cell : element("td", cell)));
  }
}

function showTables(data) {
  byId("failures-card").hidden = !data.failures.length;
  table(byId("failures"), ["what", "last heard of", "came to", "went on from", "lost"], data.failures.map((one) => {
    const what = element("td"), dot = element("span", undefined, "dot");
    dot.style.background = `var(--${one.kind === "node" ? "node" : one.kind === "process" ? "failed" : "skipped"})`;
    what.append(dot, FAILURE_WORDS[one.kind] + (one.how === "raised" ? " (exception)" : ""));
    const lost = `${one.at_least ? "≥ " : ""}${span(one.lost_secs)}${one.lost_steps === null ? "" : `, ${plural(one.lost_steps, "step")}`}`;
    return [what, when(data, one.at), one.reached === null ? "?" : `step ${count(one.reached)}`, one.restored === null ? "the beginning" : `step ${count(one.restored)}`, lost];
  }));
  byId("notes-card").hidden = !data.notes.length;
  byId("notes-title").textContent = `Warnings (${count(data.notes.length)})`;
  table(byId("notes"), ["when", "what", "why"], data.notes.map(([time, kind, text]) => [when(data, time), kind, element("td", text, "long")]));
  byId("remarks").append(...data.remarks.map((text) => element("li", text)));
}

function setTheme(name) { document.documentElement.dataset.theme = name; }

function start() {
  const data = JSON.parse(byId("data").textContent), dark = matchMedia("(prefers-color-scheme: dark)");
  setTheme(dark.matches ? "dark" : "light");
  showSummary(data);
  showFigures(data);
  showLegend(data);
  showTables(data);
  const chart = new Chart(data, byId("lanes"), byId("overview")), hands = new Hands(chart, byId("tip"), byId("cross"));
  let chosen = false;
  dark.addEventListener("change", () => { if (!chosen) { setTheme(dark.matches ? "dark" : "light"); hands.redraw(); } });
  byId("theme").addEventListener("click", () => {
    chosen = true;
    setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    hands.redraw();
  });
  const axis = (bySteps) => () => {
    for (const [id, on] of [["by-time", !bySteps], ["by-step", bySteps]]) byId(id).setAttribute("aria-checked", String(on));
    chart.setAxis(bySteps);
    hands.redraw();
  };
  byId("by-time").addEventListener("click", axis(false));
  byId("by-step").addEventListener("click", axis(true));
  byId("zoom-in").addEventListener("click", () => { chart.zoom(0.6); hands.redraw(); });
  byId("zoom-out").addEventListener("click", () => { chart.zoom(1 / 0.6); hands.redraw(); });
  byId("fit").addEventListener("click", () => { chart.fit(); hands.redraw(); });
  const began = performance.now();
  chart.draw();
  new ResizeObserver(() => { if (byId("plot").clientWidth !== chart.width) hands.redraw(); }).observe(byId("plot"));
  document.documentElement.dataset.ready = String(Math.round(performance.now() - began) + 1);
  return chart;
}

const drawn = start();
