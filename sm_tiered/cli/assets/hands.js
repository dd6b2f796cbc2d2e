// Pointer, wheel and keys: looking closer, moving along, and what stands at the pointer.

class Hands {
  constructor(chart, tip, cross) {
    this.chart = chart; this.tip = tip; this.cross = cross;
    this.pointers = new Map();
    const { canvas, overview } = chart;
    canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => this.up(event));
    canvas.addEventListener("pointerleave", () => this.leave());
    canvas.addEventListener("dblclick", () => { chart.fit(); this.redraw(); });
    canvas.addEventListener("keydown", (event) => this.key(event));
    overview.addEventListener("pointerdown", (event) => { overview.setPointerCapture(event.pointerId); this.jump(event); });
    overview.addEventListener("pointermove", (event) => { if (event.buttons) this.jump(event); });
  }

  redraw() {
    if (this.waiting) return;
    this.waiting = requestAnimationFrame(() => { this.waiting = 0; this.chart.draw(); this.clear(); });
  }

  wheel(event) {
    event.preventDefault();
    const { chart } = this, range = chart.to - chart.from;
    if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
      const shift = ((event.deltaX || event.deltaY) / (chart.right - chart.left)) * range;
      chart.look(chart.from + shift, chart.to + shift);
    } else chart.zoom(Math.exp(Math.max(-1, Math.min(1, event.deltaY * 0.0022))), chart.valueAt(event.offsetX));
    this.redraw();
  }

  down(event) {
    this.pointers.set(event.pointerId, event.offsetX);
    this.chart.canvas.setPointerCapture(event.pointerId);
  }

  move(event) {
    const before = this.pointers.get(event.pointerId), { chart } = this;
    if (before === undefined) { this.hover(event.offsetX, event.offsetY); return; }
    if (this.pointers.size === 2) this.pinch(event);
    else if (Math.abs(event.offsetX - before) > 1) {
      chart.canvas.classList.add("dragging");
      const shift = ((before - event.offsetX) / (chart.right - chart.left)) * (chart.to - chart.from);
      chart.look(chart.from + shift, chart.to + shift);
      this.redraw();
    }
    this.pointers.set(event.pointerId, event.offsetX);
  }

  pinch(event) {
    const [other] = [...this.pointers].filter(([id]) => id !== event.pointerId).map(([, x]) => x), { chart } = this;
    const before = Math.abs(this.pointers.get(event.pointerId) - other), now = Math.abs(event.offsetX - other);
    if (before > 8 && now > 8) chart.zoom(before / now, chart.valueAt((event.offsetX + other) / 2));
    this.redraw();
  }

  up(event) {
    this.pointers.delete(event.pointerId);
    this.chart.canvas.classList.remove("dragging");
    if (event.pointerType === "touch") this.hover(event.offsetX, event.offsetY);
  }

  leave() { if (!this.pointers.size) this.clear(); }

  key(event) {
    const { chart } = this, shift = (chart.to - chart.from) * 0.2;
    const acts = {
      ArrowLeft: () => chart.look(chart.from - shift, chart.to - shift), ArrowRight: () => chart.look(chart.from + shift, chart.to + shift),
      "+": () => chart.zoom(0.7), "=": () => chart.zoom(0.7), "-": () => chart.zoom(1 / 0.7), 0: () => chart.fit(), Home: () => chart.fit(),
    };
    if (!acts[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    acts[event.key]();
    event.preventDefault();
    this.redraw();
  }

  jump(event) {
    const { chart } = this, [low, high] = chart.limits, half = (chart.to - chart.from) / 2;
    const value = low + ((event.offsetX - chart.left) / (chart.right - chart.left)) * (high - low);
    chart.look(value - half, value + half);
    this.redraw();
  }

  /** What stands at a point: a mark near its top, a bar, or the work at risk. */
  find(x, y) {
    const { chart } = this, { data } = chart;
    if (x < chart.left - 4 || x > chart.right + 4) return null;
    const mark = nearest(chart.marks, (one) => Math.abs(chart.x(one.x) - x), y < TOP ? 9 : 2);
    if (mark && (y < TOP || y < chart.riskY)) return { x: chart.x(mark.x), words: markWords(data, mark) };
    for (const lane of chart.lanes) {
      if (y < lane.y - LANE_GAP / 2 || y > lane.y + lane.height + LANE_GAP / 2) continue;
      const bar = this.barAt(lane, x, y);
      return bar && { x: chart.x(lane.kind === "training" ? chart.valueAt(x) : bar.x0), bar, lane, words: lane.kind === "training" ? legWords(data, bar) : saveWords(data, bar.save) };
    }
    if (y < chart.riskY || y > chart.riskY + RISK) return null;
    return this.riskAt(x);
  }

  barAt(lane, x, y) {
    const { chart } = this, value = chart.valueAt(x), reach = chart.valueAt(x + 7) - value;
    const row = Math.floor(((y - lane.y) / lane.height) * lane.rows);
    let best = null, least = Infinity;
    for (let i = lowerBound(lane.bars.length, (n) => lane.bars[n].x0, value - reach - lane.widest); i < lane.bars.length; i++) {
      const bar = lane.bars[i];
      if (bar.x0 > value + reach) break;
      let away = value < bar.x0 ? bar.x0 - value : value > bar.x1 ? value - bar.x1 : 0;
      if (lane.kind !== "training" && away > reach) continue;
      if (lane.kind === "training" && away > 0) continue;
      if (lane.rows > 1 && bar.row !== row) away += reach * 0.5;
      if (away <= least) { best = bar; least = away; }
    }
    return best;
  }

  riskAt(x) {
    const { chart } = this, value = chart.valueAt(x);
    const seen = chart.risk.filter((one) => one.x0 <= value && value <= one.x1), one = seen[seen.length - 1];
    if (!one) return null;
    const share = one.x1 > one.x0 ? (value - one.x0) / (one.x1 - one.x0) : 0;
    const time = one.from + share * (one.to - one.from);
    return { x, words: riskWords(chart.data, one, time), risk: [one.process + time - one.from, one.node + time - one.from] };
  }

  hover(x, y) {
    const found = this.find(x, y);
    this.clear(Boolean(found));
    if (!found) return;
    const { chart } = this, context = fitCanvas(this.cross, chart.width, chart.height), { colours } = chart;
    context.strokeStyle = colours.faint;
    context.beginPath(); context.moveTo(Math.round(found.x) + 0.5, TOP - 8); context.lineTo(Math.round(found.x) + 0.5, chart.riskY + RISK); context.stroke();
    for (const [i, value] of (found.risk || []).entries()) {
      context.fillStyle = [colours.memory, colours["risk-node-line"]][i];
      context.beginPath(); context.arc(found.x, chart.riskAt(value), 4, 0, 7); context.fill();
    }
    if (found.bar && found.lane.kind !== "training") {
      const x0 = chart.x(found.bar.x0), x1 = Math.max(chart.x(found.bar.x1), x0 + 3);
      context.strokeStyle = colours.ink; context.lineWidth = 1.5;
      context.beginPath(); context.roundRect(Math.max(x0 - 2, chart.left - 2), found.lane.y - 1, Math.min(x1, chart.right) - Math.max(x0, chart.left) + 4, found.lane.height + 2, 4); context.stroke();
    }
    this.say(found, x, y);
  }

  say({ words }, x, y) {
    const { tip, chart } = this, list = document.createElement("dl"), title = document.createElement("h3");
    title.textContent = words.title;
    for (const [name, value] of words.rows) {
      const term = list.appendChild(document.createElement("dt")), said = list.appendChild(document.createElement("dd"));
      term.textContent = name;
      said.textContent = value;
    }
    tip.replaceChildren(title, list);
    tip.hidden = false;
    const { offsetWidth: wide, offsetHeight: high } = tip;
    const left = x + 18 + wide > chart.width ? x - 18 - wide : x + 18, top = Math.min(Math.max(y - high / 2, -4), chart.height - high);
    tip.style.transform = `translate(${Math.max(0, Math.min(left, chart.width - wide))}px, ${top}px)`;
  }

  clear(keepTip = false) {
    if (!keepTip) this.tip.hidden = true;
    const context = this.cross.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.cross.width, this.cross.height);
  }
}

function nearest(items, away, within) {
  let best = null, least = within;
  for (const item of items) { const found = away(item); if (found <= least) { best = item; least = found; } }
  return best;
}
