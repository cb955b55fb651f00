// The page: reads the state every two seconds, and shows the models in groups, filtered, searched and in order.

const REFRESH_MS = 2000;
const REFRESH_HIDDEN_MS = 10000;  // a tab in the background goes on remembering
const MOST_CARDS = 30;            // more models are shown as a list in groups
const FIRST_ROWS = 25;            // of a group that is one of many
const MORE_ROWS = 100;
const MOST_GROUPS = 20;
const OTHERS = "Other ids";

const byId = id => document.getElementById(id);
const main = document.querySelector("main");
const models = new Map();   // id -> {id, own, members, waiting, refused, pressure, watches, view}
const groups = new Map();   // prefix -> GroupView
let state = null, timer = 0, paused = false, filter = "all", asked = "", prefixes = [], turn = 0;

// -- what was read

function take(next) {
  const now = performance.now();
  state = next;
  for (const model of models.values()) model.shown = false;
  for (const row of next.models) {
    let model = models.get(row.id);
    if (!model) models.set(row.id, model = {id: row.id, lower: row.id.toLowerCase(), watches: new Map(), view: null});
    const rows = row.kind === null ? row.meters : [row, ...row.meters];
    model.members = rows.map(row => {
      let watch = model.watches.get(row.id);
      if (!watch) model.watches.set(row.id, watch = new Watch());
      const kind = next.kinds[row.kind];
      watch.add(now, row, kind);
      return {row, kind, watch};
    });
    for (const [id, watch] of model.watches) if (watch.seen !== now) model.watches.delete(id);
    model.own = row.kind === null ? null : model.members[0];
    model.waiting = model.own ? row.waiting : Math.max(...rows.map(row => row.waiting));
    model.refused = rows.reduce((sum, row) => sum + row.refused, 0);
    model.pressure = Math.max(...model.members.map(({row, kind}) => kind.denies ? row.pressure : 0));
    model.refusing = model.members.some(({watch}) => watch.refuses);
    model.shown = true;
    model.seen = now;
  }
  for (const [id, model] of models) {
    if (model.shown) continue;
    // What is not among those sent or found may come back; it is remembered as long as there is anything to tell.
    const all = asked === "" && next.models_found <= next.models.length;
    if (all || now - model.seen > SLOTS * SLOT_MS) models.delete(id);
  }
  prefixes = largePrefixes();
}

// -- which of it is shown, and where

const prefixOf = id => (/^.{1,60}?[/:@]/.exec(id) || /^[^-_.#]{1,60}[-_.]/.exec(id) || [OTHERS])[0];

// The prefixes that are groups of their own: of several ids, and not too many.
function largePrefixes() {
  const count = new Map();
  for (const model of models.values()) {
    model.prefix ??= prefixOf(model.id);
    if (model.shown && model.prefix !== OTHERS) count.set(model.prefix, (count.get(model.prefix) || 0) + 1);
  }
  const large = [...count].filter(([, ids]) => ids > 1).sort((a, b) => b[1] - a[1]).slice(0, MOST_GROUPS);
  return large.map(([prefix]) => prefix).sort();
}

function grouped(list) {
  if (list.length === 0) return [];
  if (!asList()) return [["", list]];
  const byPrefix = new Map([...prefixes, OTHERS].map(prefix => [prefix, []]));
  for (const model of list) (byPrefix.get(model.prefix) || byPrefix.get(OTHERS)).push(model);
  return [...byPrefix].filter(([, some]) => some.length > 0);
}

const asList = () => state.models_total > MOST_CARDS || state.models_found > MOST_CARDS;
const collator = new Intl.Collator("en", {numeric: true});

function chosen() {
  const wanted = byId("find").value.trim().toLowerCase(), all = [], count = {all: 0, refusing: 0, waiting: 0};
  for (const model of models.values()) {
    if (!model.shown || !(model.lower.includes(wanted)
        || model.members.some(({row}) => row.id.toLowerCase().includes(wanted)))) continue;
    count.all++;
    count.refusing += model.refusing;
    count.waiting += model.waiting > 0;
    if (filter === "all" || (filter === "refusing" ? model.refusing : model.waiting > 0)) all.push(model);
  }
  const byUse = byId("sort").value === "use";
  if (asList()) all.sort((a, b) => (byUse && b.pressure - a.pressure) || collator.compare(a.id, b.id));
  return {all, count};
}

class GroupView {
  constructor() {
    this.root = template("a-group").cloneNode(true);
    Object.assign(this, parts(this.root, "prefix", "size", "now", "models", "more"));
    this.heading = this.root.querySelector("h2");
    this.button = this.heading.firstElementChild;
    this.open = true;
    this.rows = FIRST_ROWS;
    this.button.addEventListener("click", () => { this.open = !this.open; show(); });
    this.more.addEventListener("click", () => {
      const first = this.models.children[this.rows - 1];
      this.rows += MORE_ROWS;
      show();
      first.nextElementSibling?.querySelector("button").focus({preventScroll: true});
    });
  }

  show(prefix, list) {
    this.heading.hidden = prefix === "";
    say(this.prefix, prefix);
    say(this.size, plural(list.length, "id", "ids"));
    const refusing = list.filter(model => model.refusing).length;
    const waiting = list.reduce((sum, model) => sum + model.waiting, 0);
    const words = [refusing && `${figure(refusing)} refusing now`, waiting && `${figure(waiting)} waiting`];
    this.now.className = "now" + (refusing ? " refuses" : waiting ? " waits" : "");
    say(this.now, words.filter(Boolean).join(" · "));
    attribute(this.button, "aria-expanded", String(this.open));
    const open = this.open || prefix === "";
    const rows = prefix === "" ? list.length : this.rows;
    const shown = open ? list.slice(0, rows) : [];
    shown.forEach((model, index) => {
      if (!model.view) model.view = new ModelView(!asList());
      model.view.show(model);
      place(this.models, model.view.root, index);
    });
    while (this.models.children.length > shown.length) this.models.lastChild.remove();
    this.models.hidden = shown.length === 0;
    const rest = list.length - shown.length;
    this.more.hidden = !open || rest === 0;
    say(this.more, `Show ${figure(Math.min(MORE_ROWS, rest))} more of ${figure(rest)}`);
  }
}

function place(parent, child, index) {  // a move would lose the focus, so only what is elsewhere moves
  const there = parent.children[index];
  if (there === child) return;
  if (there && there.nextElementSibling === child) there.remove();
  else parent.insertBefore(child, there || null);
}

function show() {
  if (!state) return;
  const {all, count} = chosen(), list = grouped(all);
  main.className = asList() ? "list" : "cards";
  list.forEach(([prefix, some], index) => {
    if (!groups.has(prefix)) groups.set(prefix, new GroupView());
    place(main, groups.get(prefix).root, index);
    groups.get(prefix).show(prefix, some);
  });
  while (main.children.length > list.length) main.lastChild.remove();
  byId("tools").hidden = !asList() && asked === "" && byId("find").value === "";
  for (const button of byId("filters").children) {
    attribute(button, "aria-pressed", String(button.dataset.filter === filter));
    say(button.lastElementChild, figure(count[button.dataset.filter]));
  }
  showTotals();
  showCluster();
  showUnmetered();
  const refusing = count.refusing ? `${count.refusing} refusing · ` : "";
  if (document.title !== refusing + "modelquota") document.title = refusing + "modelquota";
  const note = byId("note");
  const wanted = byId("find").value.trim();
  let text = "";
  if (all.length === 0) {
    if (filter !== "all") text = "No model at the moment.";
    else text = wanted ? `No id contains “${wanted}”.` : "No model has a quota yet.";
  } else if (state.models_found > state.models.length) {
    text = `${figure(state.models.length)} of ${figure(state.models_found)} models: `
      + "those with the most waiting, refused and used. Search finds the others.";
  }
  note.hidden = text === "";
  say(note, text);
}

function showTotals() {
  byId("totals").hidden = false;
  byId("legend").hidden = state.models.length === 0;
  showCounts(byId("totals"), [
    ["Models", figure(state.models_total)], ["Serving", figure(state.serving)], ["Waiting", figure(state.waiting)],
    ["Admitted", figure(state.admitted)], ["After a wait", figure(state.waited)], ["Refused", figure(state.refused)],
    ["Warned", figure(state.warned)], ["Tokens charged", figure(state.tokens_charged)],
    ["Given back", figure(state.tokens_refunded)],
  ]);
  byId("off").hidden = state.enforcing;
}

// How this host takes part in a cluster, if it does; what only the process that exchanges its shares knows, if it answers.
function showCluster() {
  const {cluster} = state, box = byId("cluster");
  box.hidden = !cluster;
  if (!cluster) return;
  box.className = "totals" + (cluster.state === "expired" ? " refuses" : cluster.state === "ok" ? "" : " waits");
  const counts = [["Cluster", cluster.state], ["Lease left", seconds(cluster.lease_seconds)]];
  if (cluster.error) counts.push(["Store", cluster.error.replaceAll("_", " ")]);
  if (cluster.learning_seconds) counts.push(["Grants in", seconds(cluster.learning_seconds)]);
  if (cluster.leads) counts.push(["Hosts", figure(cluster.nodes)], ["Starved", figure(cluster.starved)]);
  showCounts(box, counts);
}

function showUnmetered() {
  const paths = Object.entries(state.unmetered).sort((a, b) => b[1] - a[1]);
  const body = document.querySelector("#unmetered tbody");
  byId("unmetered").hidden = paths.length === 0;
  paths.forEach(([path, count], index) => {
    let line = body.children[index];
    if (!line) {
      line = body.insertRow();
      line.insertCell();
      line.insertCell().className = "number";
    }
    say(line.children[0], path);
    say(line.children[1], figure(count));
  });
  while (body.children.length > paths.length) body.lastChild.remove();
}

// -- when

async function refresh() {
  clearTimeout(timer);
  const mine = ++turn;  // what was asked for later goes before this one
  const began = performance.now(), find = wantsServer() ? byId("find").value.trim() : "";
  let answered = false;
  try {
    const address = new URL(location.href);  // with its query, which may be what lets the reader in
    address.searchParams.delete("find");
    if (find) address.searchParams.set("find", find);
    const answer = await fetch(address, {headers: {Accept: "application/json"}, cache: "no-store"});
    answered = true;
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    const next = await answer.json();
    if (mine !== turn) return;
    asked = find;
    const read = performance.now();
    take(next);
    if (!document.hidden) show();
    main.dataset.ms = (performance.now() - read).toFixed(1);
    byId("at").dataset.at = clock.format(new Date());
    say(byId("at"), `as of ${byId("at").dataset.at}`);
    say(byId("lost"), "");
  } catch (error) {
    if (mine !== turn) return;
    say(byId("lost"), answered ? `the server answered with ${error.message}` : "no answer from the server");
  }
  if (paused) return;
  const rest = document.hidden ? REFRESH_HIDDEN_MS : REFRESH_MS;
  timer = setTimeout(refresh, Math.max(rest, 4 * (performance.now() - began)));
}

// The server searches if it has more than it sent.
const wantsServer = () => asked !== "" || (state !== null && state.models_found > state.models.length);

let typing = 0;
byId("find").addEventListener("input", () => {
  show();
  clearTimeout(typing);
  if (wantsServer()) typing = setTimeout(refresh, 250);
});
byId("sort").addEventListener("change", show);
byId("filters").addEventListener("click", event => {
  const button = event.target.closest("button");
  if (!button) return;
  filter = button.dataset.filter;
  show();
});
byId("pause").addEventListener("click", () => {
  paused = !paused;
  attribute(byId("pause"), "aria-pressed", String(paused));
  clearTimeout(timer);
  if (!paused) refresh();
});
document.addEventListener("visibilitychange", () => { if (!document.hidden && !paused) refresh(); });
refresh();  // which waits for the server, so that what follows is there when it goes on
