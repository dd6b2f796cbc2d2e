// The chart: lanes above, work at risk below, one axis for all.

const LANE = { training: 30, blocked: 34, memory: 26, durable: 36 }, LANE_GAP = 12, TOP = 26, RISK = 150, AXIS = 26;

class Chart {
  constructor(data, canvas, overview) {
    this.data = data; this.canvas = canvas; this.overview = overview;
    this.bySteps = false;
    this.models = {};
    this.setAxis(false);
  }

  setAxis(bySteps) {
    this.bySteps = bySteps;
    const key = bySteps ? "steps" : "time";
    this.models[key] = this.models[key] || {
      lanes: lanesOf(this.data, bySteps), risk: riskOf(this.data, bySteps), marks: marksOf(this.data, bySteps), extent: extent(this.data, bySteps),
    };
    Object.assign(this, this.models[key]);
    this.fit();
  }

  fit() {
    const [from, to] = this.extent, pad = (to - from) * 0.012;
    this.limits = [from - pad, to + pad];
    [this.from, this.to] = this.limits;
  }

  /** Show `from` to `to`, kept inside of what there is. */
  look(from, to) {
    const [low, high] = this.limits, least = this.bySteps ? 2 : 0.05;
    let range = Math.min(Math.max(to - from, least), high - low);
    from = Math.min(Math.max((from + to - range) / 2, low), high - range);
    this.from = from; this.to = from + range;
  }

  zoom(factor, around = (this.from + this.to) / 2) {
    const share = (around - this.from) / (this.to - this.from), range = (this.to - this.from) * factor;
    this.look(around - share * range, around + (1 - share) * range);
  }

  layout() {
    this.width = this.canvas.parentElement.clientWidth;
    this.narrow = this.width < 620;
    this.left = this.narrow ? 44 : 132;
    this.right = this.width - 8;
    let y = TOP;
    for (const lane of this.lanes) {
      lane.height = lane.kind === "training" && this.bySteps ? Math.min(84, Math.max(30, lane.rows * 9)) : LANE[lane.kind];
      if (this.narrow) y += 15;
      lane.y = y;
      y += lane.height + LANE_GAP;
    }
    if (this.narrow) y += 15;
    this.riskY = y + 6;
    this.height = this.riskY + RISK + AXIS;
  }

  x(value) { return this.left + ((value - this.from) / (this.to - this.from)) * (this.right - this.left); }
  valueAt(x) { return this.from + ((x - this.left) / (this.right - this.left)) * (this.to - this.from); }

  draw() {
    this.layout();
    this.colours = palette();
    const context = fitCanvas(this.canvas, this.width, this.height);
    this.context = context;
    this.grid();
    context.save();
    context.beginPath();
    context.rect(this.left, 0, this.right - this.left, this.height);
    context.clip();
    for (const lane of this.lanes) this[lane.kind + "Lane"](lane);
    this.riskArea();
    this.markLines();
    context.restore();
    this.titles();
    this.drawOverview();
  }

  ticks() {
    const range = this.to - this.from, most = Math.max(2, (this.right - this.left) / (this.narrow ? 78 : 104));
    const grain = this.bySteps ? plainGrain(range, most, 1) : timeGrain(range, most), found = [];
    const zero = this.bySteps ? 0 : -(this.data.t0 % grain);
    for (let i = Math.ceil((this.from - zero) / grain); zero + i * grain <= this.to; i++) found.push(zero + i * grain);
    return { grain, at: found };
  }

  grid() {
    const { context, colours } = this, { grain, at } = this.ticks(), bottom = this.riskY + RISK;
    if (!this.bySteps) this.downBands();
    context.textAlign = "center";
    context.textBaseline = "top";
    let day0 = "";
    for (const value of at) {
      const x = Math.round(this.x(value)) + 0.5;
      if (x < this.left || x > this.right) continue;
      context.strokeStyle = colours.grid;
      context.beginPath(); context.moveTo(x, TOP - 8); context.lineTo(x, bottom); context.stroke();
      context.fillStyle = colours.dim;
      let text = count(Math.round(value));
      if (!this.bySteps) {
        const { date, time } = clock(this.data.t0 + value, grain);
        text = grain >= 86400 ? day(date) : time;
        if (date !== day0 && grain < 86400 && (day0 || time.startsWith("00:00"))) text = day(date);
        day0 = date;
      }
      context.fillText(text, Math.min(Math.max(x, this.left + 14), this.right - 18), bottom + 8);
    }
  }

  /** Between launches nothing is known to go on. */
  downBands() {
    const { context, colours, data } = this;
    context.fillStyle = hatch(context, colours.hatch, colours.band);
    for (let i = 1; i < data.legs.length; i++) {
      const before = data.legs[i - 1], leg = data.legs[i];
      if (before.launch === leg.launch || leg.began <= before.ended) continue;
      const x0 = Math.max(this.x(before.ended), this.left), x1 = Math.min(this.x(leg.began), this.right);
      if (x1 > x0) context.fillRect(x0, TOP - 8, Math.max(1, x1 - x0), this.riskY + RISK - TOP + 8);
    }
  }

  trainingLane(lane) {
    const { context, colours } = this, tall = lane.height / lane.rows;
    const lost = hatch(context, colours.lost, colours.kept);
    for (const bar of visible(lane, this.from, this.to, (v) => this.x(v), 0)) {
      context.fillStyle = bar.kind === "lost" ? lost : colours[bar.kind];
      const x = this.x(bar.x0), width = Math.max(this.x(bar.x1) - x, 1);
      context.fillRect(x, lane.y + bar.row * tall, width, Math.max(1, tall - (lane.rows > 1 ? 1.5 : 0)));
    }
  }

  blockedLane(lane) {
    const { context, colours } = this;
    context.fillStyle = colours.blocked;
    let column = -1, tallest = 0;
    const flush = () => { if (column >= 0) context.fillRect(column, lane.y + lane.height - tallest, 2, tallest); };
    for (const bar of visible(lane, this.from, this.to, (v) => this.x(v))) {
      const x = this.x(bar.x0), width = this.x(bar.x1) - x, tall = Math.max(2, (bar.tall / lane.tallest) * lane.height);
      if (width >= 3) { context.fillRect(x, lane.y + lane.height - tall, width, tall); continue; }
      const place = Math.floor(x);
      if (place >= column + 2) { flush(); column = place; tallest = tall; } else tallest = Math.max(tallest, tall);
    }
    flush();
    this.baseline(lane);
  }

  memoryLane(lane) {
    const { context, colours } = this, middle = lane.y + lane.height / 2;
    this.baseline(lane, middle);
    for (const bar of visible(lane, this.from, this.to, (v) => this.x(v), 1.5)) {
      const x = this.x(bar.x0), width = Math.max(this.x(bar.x1) - x, 2.5);
      if (this.sign(bar, x, middle)) continue;
      context.fillStyle = colours.memory;
      context.globalAlpha = bar.kind === "open" ? 0.35 : 1;
      roundBar(context, x, lane.y + 3, width, lane.height - 6);
      context.globalAlpha = 1;
    }
  }

  durableLane(lane) {
    const { context, colours } = this, tall = lane.height / lane.rows;
    this.baseline(lane, lane.y + lane.height / 2);
    for (const bar of visible(lane, this.from, this.to, (v) => this.x(v), 1.2)) {
      const y = lane.y + bar.row * tall, high = tall - (lane.rows > 1 ? 2 : 6), top = lane.rows > 1 ? y : y + 3;
      const began = this.x(bar.began), end = Math.max(this.x(bar.x1), began + 2.5);
      if (this.sign(bar, this.x(bar.x0), lane.y + lane.height / 2)) continue;
      context.fillStyle = colours.drain;
      context.globalAlpha = 0.4;
      context.fillRect(this.x(bar.x0), top + high / 2 - 1, Math.max(0, began - this.x(bar.x0)), 2);
      context.globalAlpha = bar.kind === "open" ? 0.3 : 1;
      roundBar(context, began, top, end - began, high);
      context.globalAlpha = 1;
      this.barText(bar, began, end, top, high);
    }
  }

  /** How long it took, where there is room. */
  barText(bar, from, to, top, high) {
    const { context } = this, left = Math.max(from, this.left), room = Math.min(to, this.right) - left;
    if (bar.kind === "open" || high < 15) return;
    const on = this.data.saves[bar.save][6].find((one) => one[0] === bar.tier);
    const words = span(on[3] - on[2]);
    if (room < 24 || context.measureText(words).width > room - 10) return;
    context.fillStyle = "#fff";
    context.textAlign = "left"; context.textBaseline = "middle";
    context.fillText(words, left + 5, top + high / 2 + 0.5);
  }

  /** A save that did not come to the tier is a sign and no bar. */
  sign(bar, x, y) {
    const { context, colours } = this;
    if (bar.kind === "skipped") {
      diamond(context, x, y, 5);
      context.fillStyle = colours.card; context.fill();
      context.strokeStyle = colours.skipped; context.lineWidth = 1.8; context.stroke(); context.lineWidth = 1;
      return true;
    }
    if (bar.kind === "failed") {
      context.strokeStyle = colours.failed; context.lineWidth = 2.2;
      context.beginPath();
      context.moveTo(x - 4, y - 4); context.lineTo(x + 4, y + 4); context.moveTo(x + 4, y - 4); context.lineTo(x - 4, y + 4);
      context.stroke(); context.lineWidth = 1;
      return true;
    }
    return false;
  }

  baseline(lane, y = lane.y + lane.height) {
    const { context, colours } = this;
    context.strokeStyle = colours.edge;
    context.beginPath(); context.moveTo(this.left, Math.round(y) + 0.5); context.lineTo(this.right, Math.round(y) + 0.5); context.stroke();
  }

  /** The windows that can be seen; by steps those of later legs lie over earlier ones. */
  seenRisk() { return this.risk.filter((one) => one.x1 >= this.from && one.x0 <= this.to); }

  riskArea() {
    const { context, colours } = this, seen = this.seenRisk(), bottom = this.riskY + RISK;
    this.worst = seen.reduce((most, one) => Math.max(most, one.node + one.to - one.from), 0);
    const grain = timeGrain(Math.max(this.worst, 0.01) * 1.08, 4);
    this.riskTop = Math.ceil((Math.max(this.worst, grain) * 1.04) / grain) * grain;
    this.riskGrain = grain;
    for (let value = grain; value <= this.riskTop * 1.001; value += grain) this.riskLine(value, colours.grid);
    this.area(seen, (one) => one.node, colours["risk-node"], colours["risk-node-line"]);
    this.area(seen, (one) => one.process, colours["risk-process"], null);
    this.baseline({ y: bottom, height: 0 });
  }

  riskLine(value, colour) {
    const { context } = this, y = Math.round(this.riskAt(value)) + 0.5;
    context.strokeStyle = colour;
    context.beginPath(); context.moveTo(this.left, y); context.lineTo(this.right, y); context.stroke();
  }

  riskAt(value) { return this.riskY + RISK - (value / this.riskTop) * RISK; }

  /** A saw: up by a second a second, down where something became safe. Where its teeth are too many to see, their tips. */
  area(seen, valueOf, fill, line) {
    const { context } = this, bottom = this.riskY + RISK, dense = seen.length > (this.right - this.left) / 3;
    let place = 0;
    while (place < seen.length) {
      const leg = seen[place].leg, start = this.x(seen[place].x0), outline = [];
      let end = start, column = null;
      const point = (x, y) => {
        if (column && x - column.x < (dense ? 3 : 0.7)) { column.low = Math.max(column.low, y); column.high = Math.min(column.high, y); column.last = y; return; }
        if (column) outline.push(column);
        column = { x, first: y, low: y, high: y, last: y };
      };
      for (; place < seen.length && seen[place].leg === leg; place++) {
        const one = seen[place];
        point(this.x(one.x0), this.riskAt(valueOf(one)));
        end = this.x(one.x1);
        point(end, this.riskAt(valueOf(one) + one.to - one.from));
      }
      if (column) outline.push(column);
      const path = new Path2D();
      path.moveTo(start, outline[0].first);
      for (const at of outline) for (const y of dense ? [at.high] : [at.first, at.high, at.low, at.last]) path.lineTo(at.x, y);
      if (line) { context.strokeStyle = line; context.lineJoin = "round"; context.stroke(path); }
      path.lineTo(end, bottom); path.lineTo(start, bottom); path.closePath();
      context.fillStyle = fill;
      context.fill(path);
    }
  }

  markLines() {
    const { context, colours } = this;
    for (const mark of this.marks) {
      const x = Math.round(this.x(mark.x)) + 0.5, restore = mark.kind === "restore";
      if (x < this.left - 6 || x > this.right + 6) continue;
      const colour = restore ? colours.memory : mark.kind === "node" ? colours.node : mark.kind === "preempted" ? colours.skipped : colours.failed;
      context.strokeStyle = context.fillStyle = colour;
      context.setLineDash(restore ? [2, 3] : []);
      context.globalAlpha = restore ? 0.7 : 1;
      context.beginPath(); context.moveTo(x, TOP - 8); context.lineTo(x, this.riskY + RISK); context.stroke();
      context.setLineDash([]);
      context.globalAlpha = 1;
      pointer(context, x, TOP - 14, !restore);
    }
  }

  titles() {
    const { context, colours } = this;
    context.textBaseline = "middle";
    const title = (text, y, height) => {
      context.fillStyle = colours.dim;
      context.textAlign = this.narrow ? "left" : "right";
      if (this.narrow) context.fillText(clipped(context, text, this.width - 8), 4, y - 9);
      else context.fillText(clipped(context, text, this.left - 22), this.left - 12, y + height / 2);
    };
    for (const lane of this.lanes) title(lane.title, lane.y, lane.height);
    for (const lane of this.lanes.filter((one) => one.kind === "blocked" && one.tallest && !this.narrow)) {
      context.fillStyle = colours.faint;
      context.fillText(`≤ ${span(lane.tallest)}`, this.left - 12, lane.y + lane.height / 2 + 14);
    }
    if (this.narrow) title("work at risk", this.riskY - 8, 0);
    context.fillStyle = colours.dim;
    context.textAlign = "right";
    for (let value = 0; value <= this.riskTop * 1.001; value += this.riskGrain) {
      const text = this.narrow ? span(value).replace("\u00a0min", "m") : span(value);
      const y = this.riskAt(value);
      if (!value || y > this.riskY - 4) context.fillText(value ? text : "0", this.left - (this.narrow ? 4 : 12), y);
    }
    if (!this.narrow) {
      context.save();
      context.translate(14, this.riskY + RISK / 2); context.rotate(-Math.PI / 2);
      context.textAlign = "center";
      context.fillText("work at risk", 0, 0);
      context.restore();
    }
  }

  /** The whole run in a strip, and which part of it is seen. */
  drawOverview() {
    const width = this.width, height = 26, context = fitCanvas(this.overview, width, height), { colours } = this;
    const [low, high] = this.limits, x = (value) => this.left + ((value - low) / (high - low)) * (this.right - this.left);
    context.fillStyle = colours.band;
    context.fillRect(this.left, 6, this.right - this.left, 14);
    for (const bar of this.lanes[0].bars) {
      context.fillStyle = colours[bar.kind];
      context.fillRect(x(bar.x0), 6, Math.max(0.5, x(bar.x1) - x(bar.x0)), 14);
    }
    for (const mark of this.marks) {
      if (mark.kind === "restore") continue;
      context.fillStyle = mark.kind === "node" ? colours.node : colours.failed;
      context.fillRect(x(mark.x) - 1, 3, 2, 20);
    }
    context.fillStyle = colours.card;
    context.globalAlpha = 0.72;
    context.fillRect(this.left, 3, x(this.from) - this.left, 20);
    context.fillRect(x(this.to), 3, this.right - x(this.to), 20);
    context.globalAlpha = 1;
    context.strokeStyle = colours.dim;
    context.lineWidth = 1.5;
    context.beginPath(); context.roundRect(x(this.from) + 0.5, 3, Math.max(4, x(this.to) - x(this.from) - 1), 20, 4); context.stroke();
  }
}
