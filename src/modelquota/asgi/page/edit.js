// Editing a quota, if the server has an admin API. The token is kept in memory only: a reload forgets it.

let token = "";
const editor = byId("editor");
const editing = {id: "", etag: "", quota: {}};

const isLimit = field => /^(max|burst)_/.test(field);
const isMoney = field => editing.quota.unit === "usd" && /tokens/.test(field);

const ORDER = ["_per_second", "burst_", "_per_minute", "_per_hour", "_per_day", "_per_month", "concurrent",
  "queued", "_mb"];
const placeOf = field => ORDER.findIndex(part => field.includes(part));

function labelOf(field) {
  const words = field.replace(/^max_/, "").replaceAll("_", " ")
    .replace("ram mb", "RAM, MB").replace("ssd mb", "SSD, MB")
    .replace(/^burst (.*)/, "burst, $1").replace("tokens", isMoney(field) ? "dollars" : "tokens");
  return words[0].toUpperCase() + words.slice(1);
}

async function admin(method, id, body, headers = {}) {
  const base = new URL(state.admin, location.origin + location.pathname.replace(/\/+$/, ""));
  const answer = await fetch(`${base.href.replace(/\/+$/, "")}/${encodeURIComponent(id)}`, {
    method, body: body && JSON.stringify(body), cache: "no-store", credentials: "omit",
    headers: {Authorization: `Bearer ${token}`, ...(body && {"Content-Type": "application/json"}), ...headers},
  });
  const text = await answer.text();
  let content = {};
  try { content = JSON.parse(text); } catch { /* from something in between that does not speak JSON */ }
  if (answer.ok) return content;
  if (answer.status === 401) token = "";
  const error = new Error(answer.status === 401 ? "The token is not accepted."
    : answer.status === 412 ? "It has been changed in the meantime. Close, and edit it again."
    : content.error?.message || `The server answered with status ${answer.status}.`);
  error.field = content.error?.field;
  throw error;
}

function edit(id) {
  editing.id = id;
  say(byId("editor-title"), id);
  byId("editor-fields").replaceChildren();
  complain("");
  askForToken();
  editor.showModal();
  if (token) load();
}

function askForToken() {
  byId("editor-token").hidden = token !== "";
  byId("editor-save").hidden = token === "";
  byId("editor-enter").hidden = token !== "";
}

function complain(text) {
  say(byId("editor-error"), text);
}

async function load() {
  try {
    Object.assign(editing, await admin("GET", editing.id));
    showFields();
  } catch (error) {
    complain(error.message);
  }
  askForToken();
}

function showFields() {
  const box = byId("editor-fields");
  box.replaceChildren();
  const add = (field, label, input) => {
    const line = document.createElement("label"), words = document.createElement("span");
    words.textContent = label;
    input.name = field;
    line.append(words, input);
    box.append(line);
  };
  const action = document.createElement("select");
  for (const name of ["reject", "throttle", "queue", "warn"]) action.add(new Option(name, name));
  action.value = editing.quota.on_violation;
  add("on_violation", "Over a limit", action);
  for (const field of Object.keys(editing.quota).filter(isLimit).sort((a, b) => placeOf(a) - placeOf(b))) {
    const input = document.createElement("input"), value = editing.quota[field];
    input.inputMode = "decimal";
    input.autocomplete = "off";
    if (field.startsWith("max_") && field !== "max_queued_requests") input.placeholder = "no limit";
    input.value = value === null ? "" : String(isMoney(field) ? value / 1e6 : value);
    input.defaultValue = input.value;
    add(field, labelOf(field), input);
  }
  box.querySelector("select").focus();
}

function changes() {
  const changed = {};
  for (const input of byId("editor-fields").querySelectorAll("input, select")) {
    const text = input.value.trim();
    if (input.name === "on_violation") {
      if (text !== editing.quota.on_violation) changed[input.name] = text;
    } else if (text !== input.defaultValue) {
      const number = Number(text.replaceAll(",", ""));
      if (Number.isNaN(number)) throw new Error(`${labelOf(input.name)}: “${text}” is not a number.`);
      changed[input.name] = text === "" ? null : isMoney(input.name) ? Math.round(number * 1e6) : number;
    }
  }
  return changed;
}

byId("editor-form").addEventListener("submit", async event => {
  event.preventDefault();
  complain("");
  if (token === "") {
    token = byId("editor-token").querySelector("input").value.trim();
    byId("editor-token").querySelector("input").value = "";
    if (token !== "") await load();
    return;
  }
  try {
    const changed = changes();
    if (Object.keys(changed).length) await admin("PATCH", editing.id, changed, {"If-Match": editing.etag});
    editor.close();
    refresh();
  } catch (error) {
    complain(error.message);
    askForToken();
    if (error.field) byId("editor-fields").querySelector(`[name="${CSS.escape(error.field)}"]`)?.focus();
  }
});
byId("editor-cancel").addEventListener("click", () => editor.close());
