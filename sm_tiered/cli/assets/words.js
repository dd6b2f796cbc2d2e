// What stands at the pointer, as words: a title and pairs of name and value. Text from events is only ever text.

function when(data, time) {
  const { date, time: text } = clock(data.t0 + time, 0.5);
  return `${day(date)} ${text} UTC`;
}

const STATE_WORDS = { acknowledged: "whole in memory", committed: "committed", streamed: "written by the trainer itself", skipped: "left out", failed: "failed", open: "not known to be whole" };

function saveWords(data, index) {
  const [leg, step, time, blocked, bytes, requested, tiers] = data.saves[index];
  const rows = [["training went on", when(data, time)], ["blocked for", span(blocked)]];
  if (bytes !== null) rows.push(["size, this rank", size(bytes)]);
  if (requested) rows.push(["asked for", "from outside"]);
  for (const [tier, state, began, ended, sent, text] of tiers) {
    const name = STATES[state];
    let words = STATE_WORDS[name];
    if (ended !== null && name !== "skipped" && name !== "failed") words += ` after ${span(ended - time)}`;
    if (name === "committed" && ended !== null) words += ` (upload ${span(ended - began)}${sent ? `, ${size(sent / Math.max(ended - began, 1e-3))}/s` : ""})`;
    if (text >= 0) words += `: ${data.texts[text]}`;
    rows.push([data.tiers[tier], words]);
  }
  if (data.legs.length > 1) rows.push(["launch", `${data.legs[leg].launch + 1} of ${data.launches}`]);
  return { title: `Save of step ${count(step)}`, rows };
}

const LEG_WORDS = {
  kept: "Training", lost: "Training that was lost", restoring: "Restoring", closing: "Closing: waiting for the last drain",
};
const END_WORDS = { finished: "finished", closed: "closed in good order", failed: "an exception", restored: "it went back to an earlier step", silent: "nothing was heard any more" };

function legWords(data, bar) {
  const leg = data.legs[bar.leg], rows = [["from", when(data, bar.from)], ["for", span(bar.to - bar.from)]];
  rows.push(["launch", `${leg.launch + 1} of ${data.launches}`]);
  if (leg.attempt) rows.push(["attempt", leg.attempt]);
  if (leg.restored) rows.push(["continues from", `step ${count(leg.restored[0])}, ${leg.restored[1]}${leg.restored[4] ? ", chosen by the user" : ""}`]);
  if (leg.reached !== null) rows.push(["came to", `step ${count(leg.reached)}`]);
  rows.push(["ended by", END_WORDS[leg.end]]);
  return { title: LEG_WORDS[bar.kind], rows };
}

const FAILURE_WORDS = { process: "Processes died", node: "Node lost", preempted: "Preempted" };

function markWords(data, mark) {
  if (mark.kind === "restore") {
    const [step, tier, secs, bytes, chosen] = data.legs[mark.leg].restored;
    const rows = [["from", tier], ["took", span(secs)], ["at", when(data, data.legs[mark.leg].ready)]];
    if (bytes !== null) rows.push(["size, this rank", size(bytes)]);
    if (chosen) rows.push(["chosen", "by the user"]);
    return { title: `Restored step ${count(step)}`, rows };
  }
  const { at, how, reached, restored, lost_steps: steps, lost_secs: secs, at_least: least } = mark.failure;
  const rows = [["last heard of", when(data, at)], ["how", how === "raised" ? "an exception" : "without a word"]];
  if (reached !== null) rows.push(["came to", `step ${count(reached)}`]);
  rows.push(["went on from", restored === null ? "the beginning" : `step ${count(restored)}`]);
  rows.push(["lost", `${least ? "at least " : ""}${span(secs)}${steps === null ? "" : `, ${plural(steps, "step")}`}`]);
  return { title: FAILURE_WORDS[mark.kind], rows };
}

function riskWords(data, one, time) {
  const grown = time - one.from;
  const durable = data.tiers.some((_, tier) => tier !== data.memory);
  const rows = [["if the processes died", span(one.process + grown)]];
  if (durable) rows.push(["if the node were lost", span(one.node + grown)]);
  rows.push(["at", when(data, time)], ["step", count(Math.floor(stepAt(data.legs[one.leg], time)))]);
  return { title: "Work at risk", rows };
}
