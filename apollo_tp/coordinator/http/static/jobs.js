// The table of jobs.
import { act } from "./actions.js";
import { $, announce, command, confirmed, el, figure, keyed, moment, number, show, text } from "./dom.js";
import { root } from "./api.js";
import { address, many, nameOf, shownJobs, state } from "./state.js";

const ACTIONS = { running: ["pause", "cancel"], queued: ["pause", "cancel"], paused: ["resume", "cancel"], validating_files: ["cancel"] };
const before = new Map();

async function press(action, id) {
  const job = state.jobs.get(id), name = nameOf(job);
  const steps = job.step ? `The ${many(job.step, "step")} made so far stay in the served weights. ` : "";
  if (action === "cancel" && !await confirmed(`Cancel ${name}?`, `${steps}A cancelled job cannot be resumed; pause it to go on later.`, "Cancel the job")) return;
  if (await act(`train/jobs/${encodeURIComponent(id)}/${action}`)) announce(`${name}: ${action} was asked for`);
}

function makeRow(job) {
  const link = el("a", {}), box = el("input", { type: "checkbox" });
  box.addEventListener("change", () => {
    const shown = new Set(shownJobs().map(each => each.id));
    if (box.checked) shown.add(job.id); else shown.delete(job.id);
    if (!shown.has(state.focus)) state.focus = null;
    history.replaceState(null, "", address(state.focus, shown));
    dispatchEvent(new HashChangeEvent("hashchange"));
  });
  return el("tr", {}, el("td", {}, box), el("td", { class: "name" }, link, el("span", { class: "dim" })),
    el("td", {}, el("span")), el("td", { class: "num" }), el("td", { class: "num loss" }), el("td", { class: "num wide" }), el("td", { class: "wide" }), el("td", { class: "actions" }));
}

function updateRow(row, job) {
  const [box, name, pill, step, loss, tokens, started, actions] = row.cells, shown = shownJobs().some(each => each.id === job.id);
  const title = nameOf(job), link = name.firstChild, why = name.lastChild;
  box.firstChild.checked = shown;
  box.firstChild.setAttribute("aria-label", `Show ${title} in the charts`);
  text(link, title);
  link.title = job.id;
  link.setAttribute("href", address(job.id));
  text(why, job.error ? job.error.message.slice(0, 160) : job.guard?.verdict ? `guard: ${job.guard.verdict}` : job.wanted ? `will ${job.wanted} at the next step` : "");
  text(pill.firstChild, job.resumable ? "queued (resumable)" : job.state.replace("_", " "));
  pill.firstChild.className = `state ${job.state}`;
  text(step, `${number(job.step)} / ${number(job.total_steps)}`);
  text(loss, job.loss == null ? "–" : figure(job.loss));
  text(tokens, number(job.tokens));
  text(started, moment(job.started_at));
  row.className = job.id === state.focus ? "picked" : "";
  keyed(actions, ACTIONS[job.state] || [], action => action, action => {
    const label = action.charAt(0).toUpperCase() + action.slice(1);
    return el("button", { type: "button", "data-trains": true, disabled: state.readOnly, onclick: () => press(action, job.id) }, label);
  }, (button, action) => button.setAttribute("aria-label", `${action} ${title}`));
}

export function drawJobs() {
  const jobs = state.order.map(id => state.jobs.get(id));
  keyed($("jobs"), jobs, job => job.id, makeRow, updateRow);
  show($("jobs").closest(".scroll"), jobs.length > 0);
  show($("nojobs"), jobs.length === 0);
  if (!jobs.length && !$("nojobs").firstChild) {
    const url = root.href.replace(/\/$/, "");
    const sample = '{"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "Apollo."}]}';
    $("nojobs").append(el("p", {}, "No job yet. Train on a file of samples, one JSON object per line:"), command(`apollo-tp --url ${url} train samples.jsonl --follow`),
      el("p", {}, "or over HTTP:"), command(`curl ${url}/train -H 'Content-Type: application/json' -d '{"samples": [${sample}], "epochs": 3}'`));
  }
  for (const job of jobs) {
    if (before.has(job.id) && before.get(job.id) !== job.state) announce(`${nameOf(job)}: ${job.state}`);
    before.set(job.id, job.state);
  }
}
