// Numbers for people, and where they stand on an axis.

const SPANS = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];

/** A duration in at most two units, which no line break parts. */
const span = (secs) => duration(secs).replaceAll(" ", "\u00a0");

function duration(secs) {
  if (secs === null || secs === undefined) return "?";
  if (secs < 0) return "−" + duration(-secs);
  if (secs < 0.0995) return `${(secs * 1000).toFixed(secs < 0.00995 ? 1 : 0)} ms`;
  if (secs < 9.995) return `${secs.toFixed(2)} s`;
  if (secs < 59.95) return `${secs.toFixed(1)} s`;
  let whole = Math.round(secs);
  for (let i = 0; i < SPANS.length - 1; i++) {
    const [size, name] = SPANS[i], [less, lesser] = SPANS[i + 1];
    if (whole < size) continue;
    const rest = Math.round((whole % size) / less);
    if (rest * less === size) return `${Math.floor(whole / size) + 1} ${name}`;
    return `${Math.floor(whole / size)} ${name}` + (rest ? ` ${rest} ${lesser}` : "");
  }
  return `${whole} s`;
}

function size(bytes) {
  if (bytes === null || bytes === undefined) return "?";
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let place = 0;
  while (bytes >= 999.95 && place < units.length - 1) { bytes /= 1024; place++; }
  return `${place ? bytes.toFixed(1) : bytes} ${units[place]}`;
}

const count = (number) => number.toLocaleString("en-US");
const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.0995 ? 2 : 1)} %`;
const plural = (number, what) => `${count(number)} ${what}${number === 1 ? "" : "s"}`;

/** Date and time in UTC, the time to as many places as `grain` seconds want. */
function clock(utcSecs, grain = 1) {
  const text = new Date(Math.round(utcSecs * 1000)).toISOString();
  return { date: text.slice(0, 10), time: grain < 1 ? text.slice(11, 23) : grain < 60 ? text.slice(11, 19) : text.slice(11, 16) };
}

const MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split(" ");
const day = (iso) => `${Number(iso.slice(8))} ${MONTHS[Number(iso.slice(5, 7)) - 1]}`;

const TIME_GRAINS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800,
  3600, 7200, 10800, 21600, 43200, 86400, 172800, 604800, 1209600, 2592000, 7776000, 31536000];

/** The smallest round interval of which no more than `most` fit into `range`. */
function timeGrain(range, most) {
  return TIME_GRAINS.find((grain) => range / grain <= most) || TIME_GRAINS[TIME_GRAINS.length - 1];
}

function plainGrain(range, most, least = 0) {
  const raw = Math.max(range / most, 1e-9), power = 10 ** Math.floor(Math.log10(raw));
  const found = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= raw * 0.999);
  return Math.max(found, least);
}

/** Index of the first of `count` whose value is at least `wanted`; values ascend. */
function lowerBound(count, valueAt, wanted) {
  let low = 0, high = count;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (valueAt(middle) < wanted) low = middle + 1; else high = middle;
  }
  return low;
}
