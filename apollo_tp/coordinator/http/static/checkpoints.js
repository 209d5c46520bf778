// Checkpoints: written ones, save, restore.
import { act } from "./actions.js";
import { get, root } from "./api.js";
import { $, announce, bytes, command, confirmed, el, keyed, moment, number, show, text } from "./dom.js";
import { nameOf, state } from "./state.js";

const REASONS = { request: "asked for", job: "end of a job", idle: "while idle", guard: "before a guarded job" };
let known = new Map();

function stateOf(record) {
  if (record.restore?.state === "queued") return ["being restored", "running"];
  if (record.restore?.state === "failed") return [`restoring failed: ${record.restore.error}`, "failed"];
  if (record.state === "queued") return ["being written", "running"];
  if (record.state === "failed") return [`failed: ${record.error}`, "failed"];
  return record.restore ? [`restored ${moment(record.restore.finished_at)}`, "succeeded"] : ["written", "succeeded"];
}

async function restore(id) {
  const record = known.get(id), lost = state.status?.unsaved ? "What was trained since the last checkpoint is not saved and is lost; save it first to keep it." : "";
  const body = `The served weights and the optimizer state are replaced by those of ${moment(record.finished_at)} (weight version ${number(record.weight_version)}). ${lost}`;
  if (!await confirmed(`Restore ${record.name}?`, body, "Restore")) return;
  if (await act(`checkpoint/${encodeURIComponent(id)}/restore`)) announce(`${record.name} is being restored`);
}

export async function loadCheckpoints() {
  const records = (await get("checkpoints?limit=20")).data;
  known = new Map(records.map(record => [record.id, record]));
  const make = record => el("tr", {}, el("td", { class: "name" }, el("span"), el("span", { class: "dim" })), el("td", { class: "name" }, el("span")), el("td", { class: "num wide" }),
    el("td", { class: "num wide" }), el("td"), el("td", { class: "actions" }, el("button", { type: "button", "data-trains": true, onclick: () => restore(record.id) }, "Restore")));
  keyed($("checkpoints"), records, record => record.id, make, (row, record) => {
    const [name, where, version, size, when, actions] = row.cells, [words, kind] = stateOf(record), job = state.jobs.get(record.job_id);
    text(name.firstChild, record.name || "next");
    text(name.lastChild, `${REASONS[record.reason] || record.reason}${job ? `, ${nameOf(job)}` : ""}`);
    name.title = record.path;
    text(where.firstChild, words);
    where.firstChild.className = `state ${kind}`;
    text(version, number(record.weight_version));
    text(size, bytes(record.num_bytes));
    text(when, moment(record.finished_at));
    const button = actions.firstChild;
    button.disabled = state.readOnly || record.restore?.state === "queued";
    button.setAttribute("aria-label", `restore ${record.name}`);
    show(button, record.state === "succeeded" && !record.fallback);
  });
  show($("checkpointtable"), records.length > 0);
  show($("nocheckpoints"), records.length === 0);
  if (!records.length && !$("nocheckpoints").firstChild)
    $("nocheckpoints").append(el("p", {}, "No checkpoint yet. Trained weights live in the server's memory and are lost with it until they are saved, here or by"), command(`apollo-tp --url ${root.href.replace(/\/$/, "")} checkpoint`));
}

export function setUp() {
  $("save").dataset.trains = "";
  $("save").addEventListener("click", async () => { if (await act("checkpoint")) announce("The weights are being saved"); });
}
