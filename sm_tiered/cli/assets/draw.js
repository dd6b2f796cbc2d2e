// Drawing on a canvas: bars, areas, marks. Nothing here knows where the data comes from.

const FONT = '12px ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif';

/** The colours of the theme, as the style sheet has them. */
function palette() {
  const style = getComputedStyle(document.documentElement), found = {};
  for (const name of ["ink", "dim", "faint", "grid", "band", "hatch", "card", "edge", "kept", "blocked", "lost", "restoring", "closing",
    "down", "memory", "drain", "skipped", "failed", "node", "risk-process", "risk-node", "risk-node-line"]) {
    found[name] = style.getPropertyValue("--" + name).trim();
  }
  return found;
}

/** Fit the canvas to its box at the screen's own resolution; return its context in CSS pixels. */
function fitCanvas(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.font = FONT;
  return context;
}

function hatch(context, ink, back) {
  const tile = document.createElement("canvas");
  tile.width = tile.height = 7;
  const pen = tile.getContext("2d");
  pen.fillStyle = back;
  pen.fillRect(0, 0, 7, 7);
  pen.strokeStyle = ink;
  pen.lineWidth = 1.2;
  pen.beginPath();
  for (const shift of [-7, 0, 7]) { pen.moveTo(shift, 7); pen.lineTo(shift + 7, 0); }
  pen.stroke();
  return context.createPattern(tile, "repeat");
}

function roundBar(context, x, y, width, height) {
  const radius = Math.min(3, width / 2, height / 2);
  if (radius < 1) { context.fillRect(x, y, width, height); return; }
  context.beginPath();
  context.roundRect(x, y, width, height, radius);
  context.fill();
}

function diamond(context, x, y, reach) {
  context.beginPath();
  context.moveTo(x, y - reach); context.lineTo(x + reach, y); context.lineTo(x, y + reach); context.lineTo(x - reach, y);
  context.closePath();
}

/** The marks at the top of failures (pointing down) and restores (pointing up). */
function pointer(context, x, y, down) {
  const reach = down ? 5 : -5;
  context.beginPath();
  context.moveTo(x - 5, y - reach); context.lineTo(x + 5, y - reach); context.lineTo(x, y + reach * .9);
  context.closePath();
  context.fill();
}

/** Text cut to a width. */
function clipped(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  let end = text.length;
  while (end > 1 && context.measureText(text.slice(0, end) + "…").width > width) end--;
  return text.slice(0, end) + "…";
}

/** Bars that would fall on one pixel are drawn once; the first of a lane that can be seen is found by search. */
function* visible(lane, from, to, scale, gap = 0.6) {
  const bars = lane.bars, last = {};
  for (let i = lowerBound(bars.length, (n) => bars[n].x0, from - lane.widest); i < bars.length; i++) {
    const bar = bars[i];
    if (bar.x0 > to) break;
    if (bar.x1 < from) continue;
    const end = scale(bar.x1), key = bar.kind + bar.row;
    if (last[key] !== undefined && end - last[key] < gap && !bar.tall) continue;
    last[key] = end;
    yield bar;
  }
}
