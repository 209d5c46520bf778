// The page: asks the coordinator every second, and shows what has changed.
import { problem, refresh } from "./actions.js";
import { get, Refusal, sentence, Unreachable } from "./api.js";
import * as asking from "./ask.js";
import * as checkpoints from "./checkpoints.js";
import { $, text } from "./dom.js";
import * as figures from "./figures.js";
import { drawJob, setUp as setUpJob } from "./job.js";
import { drawJobs } from "./jobs.js";
import { drawLatencyTile, drawNow } from "./now.js";
import { setUp as setUpSamples } from "./samples.js";
import { curveOf, loadLatency } from "./series.js";
import { loadJobs, readAddress, shownJobs, state } from "./state.js";
import { loadFeedback, loadLayout } from "./tables.js";

let busy = false, asked = false, focusWanted = null, ticks = 0;

async function load(all) {
  state.status = await get("train/status");
  const known = !state.status.running || state.jobs.has(state.status.running.id);
  if (state.status.running && known) state.jobs.set(state.status.running.id, state.status.running);
  drawNow();
  if (ticks % 2 === 0 || all || !known) await loadJobs();
  for (const job of shownJobs()) await curveOf(job.id).load();
  drawJobs();
  drawJob();
  if (focusWanted && focusWanted === state.focus) $("job-title").focus();
  focusWanted = null;
  if (ticks % 2 === 0) await loadLatency();
  drawLatencyTile();
  figures.draw();
  if (ticks % 2 === 0 || all) await checkpoints.loadCheckpoints();
  if (ticks % 4 === 0) await loadFeedback();
  if (ticks % 10 === 0) await loadLayout();
  await asking.find();
  asking.drawAsk();
}

async function once(all) {
  try {
    await load(all);
    problem("");
  } catch (error) {
    if (error.code !== "no_server") problem(sentence(error)); // the header says what is waited for
    if (!(error instanceof Refusal || error instanceof Unreachable)) console.error(error);
    if (error instanceof Unreachable) { $("dot").classList.remove("on"); text($("trainer"), "not connected"); document.title = "no answer · apollo_tp"; }
    if (error.status === 404 && !state.jobs.has(state.focus)) state.focus = null; // a link to a job that is not there
  }
  ticks++;
}

/** `all`: also what is not asked for every second, after something was done. */
async function tick(all = false) {
  asked ||= all;
  if (busy) return;
  busy = true;
  do {
    const now = asked;
    asked = false;
    await once(now);
  } while (asked);
  busy = false;
}

function follow(event) {
  const before = state.focus;
  readAddress();
  if (event.isTrusted && state.focus !== before) focusWanted = state.focus;
  tick(true);
}

refresh.now = () => tick(true);
readAddress();
for (const part of [figures, asking, checkpoints]) part.setUp();
setUpJob();
setUpSamples();
addEventListener("hashchange", follow);
tick();
setInterval(() => tick(), 1000);
