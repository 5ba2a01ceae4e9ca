// The page: what happens between its parts.

import * as api from "./api.js";
import { find, loadImage } from "./dom.js";
import { startDrop } from "./drop.js";
import { listen } from "./events.js";
import { parse } from "./exact.js";
import { fill, refuse, startForm } from "./form.js";
import * as gallery from "./gallery.js";
import { startKeys } from "./keys.js";
import { startMask } from "./mask.js";
import { parametersOf } from "./metadata.js";
import { notify, speak, tell, tellUnlessGone } from "./notices.js";
import * as queue from "./queue.js";
import { showSession, startSession } from "./session.js";
import { addReference, fillSources, setInput, sourceUrl, uploaded } from "./sources.js";
import * as stage from "./stage.js";
import { startTheme } from "./theme.js";
import { say, startWords } from "./words.js";

let ready = false;
let connected = false;

function connection(state) {
  find("connection").dataset.state = state;
  say(find("connection-text"), state);
}

async function submit(values) {
  try {
    const made = await api.makeJob(values);
    // A job can be done before the answer about its beginning is here.
    const job = queue.get(made.id) ?? queue.latest(made);
    stage.follow(job.id);
    if (!queue.active(job)) return onJob(job);
    queue.put(job);
    watch(job);
    speak(job.state === "queued" && job.position > 0 ? "saidQueued" : "saidStarted", { n: job.position });
  } catch (error) {
    if (error.status === 0 || error.status === 429 || error.status >= 500) tell(error);
    else refuse(error);
  }
  return undefined;
}

/** Show a job large, and its picture when it is done; jobs that were followed before come first, unless it was clicked. */
function watch(job, first = false) {
  if (!job) return undefined;
  if (job.state === "failed") return stage.showFailed(job);
  stage.follow(job.id, first);
  stage.showJob(queue.get(stage.followed()) ?? job);
  if (matchMedia("(max-width: 60rem)").matches) find("stage").scrollIntoView({ block: "start" });
  return undefined;
}

let quarter = 0;

function onJob(news) {
  const job = queue.latest(news);
  const before = queue.get(job.id)?.pictures?.length ?? 0;
  queue.put(job);
  const mine = job.id === stage.followed();
  if (mine) told(job);
  if (mine && queue.active(job)) stage.showJob(job);
  else if (!queue.active(job)) ended(job, mine);
  else if (!stage.followed() && job.state === "running" && !stage.shownPicture()) watch(job);
  if (queue.active(job) && (job.pictures?.length ?? 0) > before) gallery.refresh().catch(tellUnlessGone);
}

/** A job has ended: what it made, or the next one that is followed, comes on show. */
async function ended(job, mine) {
  stage.unfollow(job.id);
  // Those that wait have moved up, also where nothing else is told of them.
  if (queue.anyWaits()) queue.refresh().catch(tellUnlessGone);
  if (job.state !== "cancelled") await gallery.refresh().catch(tellUnlessGone);
  if (!mine) return;
  const next = queue.get(stage.followed());
  const first = gallery.picture(job.pictures?.[0]?.id);
  if (job.state === "failed") stage.showFailed(job);
  else if (next) stage.showJob(next);
  else if (job.state === "done" && first) {
    // Without a flash: the finished picture takes the place of the preview when it is there.
    await loadImage(api.pictureUrl(first.id)).catch(() => {});
    if (!stage.followed()) gallery.choose(first.id);
  } else showSomething();
}

/** Read out how far a job is: its start, each quarter, its end. */
function told(job) {
  const { step = 0, steps = 0 } = job.progress ?? {};
  const now = steps ? Math.floor((4 * step) / steps) : 0;
  if (job.state === "done") speak("saidDone", { n: job.pictures?.length ?? 1 });
  else if (job.state === "failed") speak("saidFailed");
  else if (job.state === "cancelled") speak("saidCancelled");
  else if (job.state === "running" && now > quarter && step < steps) speak("stepOf", { step, steps });
  quarter = queue.active(job) ? now : 0;
}

/** Show what was on show before, else the newest picture. */
function showSomething() {
  const picture = gallery.picture(gallery.chosenId()) ?? gallery.newest();
  if (!picture) return stage.showEmpty();
  gallery.setChosen(picture.id);
  return stage.showPicture(picture);
}

/** Find out how followed jobs went while nobody listened. */
async function catchUp() {
  for (let id = stage.followed(); id; id = stage.followed()) {
    const job = await api.job(id).catch(() => null);
    if (job && queue.active(job)) return onJob(job);
    stage.unfollow(id);
    if (job?.state === "failed") return stage.showFailed(job);
    const made = gallery.picture(job?.pictures?.[0]?.id);
    if (made && !stage.followed()) gallery.choose(made.id);
  }
  return undefined;
}

/** After each connection: ask for what may have happened before it. */
async function refresh() {
  try {
    const info = await api.info();
    showSession(info);
    say(find("about"), "about", { version: info.version, model: info.models.map(({ id }) => id).join(", ") });
    if (!ready) startForm(info, submit);
    await Promise.all([queue.refresh(), gallery.refresh()]);
    await catchUp();
    if (!stage.followed()) {
      const running = queue.all().find(({ state }) => state === "running");
      if (running && !stage.shownPicture() && !gallery.chosenId()) watch(running);
      else if (!stage.showsFailure() && !gallery.picture(stage.shownPicture()?.id)) showSomething();
    }
    if (ready && !connected) notify("connectedAgain");
    ready = connected = true;
    connection("connected");
  } catch (error) {
    tellUnlessGone(error);
  }
}

function lost() {
  if (connected || !ready) connection(ready ? "reconnecting" : "connecting");
  if (connected) notify("connectionLost", {}, { kind: "error" });
  connected = false;
}

const jobs = new Map(); // promises, by id

/** What a picture was made from, as a request, and what the server remarked about its job. */
async function recipe({ id, job = id.replace(/-\d+$/, ""), seed, parameters }) {
  if (!jobs.has(job)) jobs.set(job, api.job(job).catch(() => null));
  const found = await jobs.get(job);
  if (!found) jobs.delete(job);
  const given = Object.entries({ ...(parameters ?? found?.parameters), seed, count: 1 });
  return [Object.fromEntries(given.filter(([, value]) => value !== null && value !== undefined)), found?.warnings ?? []];
}

async function another(picture) {
  const [{ seed, ...request }] = await recipe(picture);
  return submit(request);
}

function filled(lacking, actions = []) {
  if (lacking.length) notify("lorasLacking", { names: lacking.join(", ") }, { actions });
  else notify("parametersFilled", {}, { actions });
}

async function useParameters(picture) {
  const [parameters] = await recipe(picture);
  fillSources(parameters);
  filled(fill(parameters));
  find("prompt").focus();
}

function edit({ id }) {
  setInput(id, api.pictureUrl(id));
  find("prompt").focus();
  find("prompt").select();
  speak("saidInput");
}

/** Take pictures that were dropped or pasted. */
async function take(zone, { files, picture }) {
  if (!ready) return;
  if (picture) {
    const item = gallery.picture(picture);
    if (zone === "parameters") await useParameters(item);
    else if (zone === "reference") addReference(picture, api.pictureUrl(picture));
    else edit(item);
    return;
  }
  for (const file of zone === "reference" ? files : files.slice(0, 1)) {
    const upload = await uploaded(file, zone === "reference" ? "references" : "input");
    if (!upload) return;
    const url = api.uploadUrl(upload.id);
    const asInput = () => setInput(upload.id, url);
    if (zone === "reference") addReference(upload.id, url);
    else if (zone !== "input" && upload.parameters) {
      const text = await parametersOf(file);
      filled(fill({ ...upload.parameters, ...(text && parse(text)) }), [["useAsInput", asInput]]);
    } else if (zone === "parameters") notify("noParameters", {}, { kind: "error", actions: [["useAsInput", asInput]] });
    else asInput();
  }
}

startTheme(find("theme"));
startWords(find("language"));
startSession();
startMask();
queue.startQueue((job) => watch(job, true));
gallery.startGallery((picture) => {
  stage.unfollowAll();
  if (picture) stage.showPicture(picture);
  else showSomething();
});
stage.startStage({
  again: async (picture) => submit((await recipe(picture))[0]),
  another,
  edit,
  reference: ({ id }) => addReference(id, api.pictureUrl(id)) && notify("referenceAdded"),
  fill: useParameters,
  remove: ({ id }) => gallery.remove(id),
  cancel: (id) => id && queue.cancel(id),
  retry: ({ parameters }) => submit(parameters),
  recipe,
  example: (text) => {
    find("prompt").value = text;
    find("prompt").dispatchEvent(new Event("input", { bubbles: true }));
    find("form").requestSubmit();
  },
  sourceUrl,
});
startDrop((zone, what) => take(zone, what).catch(tell));
startKeys(() => {
  const job = stage.followed() ?? queue.current()?.id;
  if (job) queue.cancel(job);
});
listen({ onOpen: refresh, onLost: lost, on: { job: onJob, preview: stage.showPreview } });
