// The chat page: conversations live in this browser, answers come from /v1/chat/completions.

const $ = (id) => document.getElementById(id);
const KEEP = 100; // conversations

function stored(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(`mobilellm.${name}`)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function store(name, value) {
  try {
    localStorage.setItem(`mobilellm.${name}`, JSON.stringify(value));
  } catch {
    tell("This browser keeps no more: delete some conversations.");
  }
}

let conversations = stored("conversations", []);
let current = conversations[0] ?? fresh();
let model = "";
let asking = null; // the AbortController of the answer that is coming

function fresh() {
  return { id: crypto.randomUUID?.() ?? String(Math.random()), title: "", messages: [] };
}

function keep() {
  conversations = [current, ...conversations.filter((each) => each.id !== current.id)];
  conversations = conversations.filter((each) => each.messages.length).slice(0, KEEP);
  store("conversations", conversations);
  showList();
}

function tell(text) {
  $("status").textContent = text;
}

function button(text, label, act) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  if (label) made.setAttribute("aria-label", label);
  made.addEventListener("click", act);
  return made;
}

function showList() {
  $("conversations").replaceChildren(
    ...conversations.map((each) => {
      const title = each.title || "Conversation";
      const open = button(title, "", () => choose(each));
      if (each.id === current.id) open.setAttribute("aria-current", "true");
      const item = document.createElement("li");
      item.append(open, button("✕", `Delete ${title}`, () => remove(each)));
      return item;
    }),
  );
}

function choose(conversation) {
  stop();
  current = conversation;
  showList();
  show();
  $("question").focus();
}

function remove(conversation) {
  conversations = conversations.filter((each) => each.id !== conversation.id);
  store("conversations", conversations);
  if (conversation.id === current.id) choose(fresh());
  else showList();
  $("new").focus();
}

// Text with its fenced code in boxes, built of nodes: nothing of an answer is read as HTML.
function body(text) {
  return text.split(/^```.*$/m).map((part, number) => {
    if (number % 2 === 0) {
      const paragraph = document.createElement("p");
      paragraph.textContent = part.replace(/^\n|\n$/g, "");
      return paragraph;
    }
    const box = document.createElement("pre");
    box.tabIndex = 0;
    const code = document.createElement("code");
    code.textContent = part.replace(/^\n|\n$/g, "");
    box.append(code);
    return box;
  });
}

function article(message, number) {
  const made = document.createElement("article");
  made.className = message.role;
  const who = document.createElement("h2");
  who.textContent = { user: "You", assistant: "Model", error: "Error" }[message.role];
  made.append(who, ...body(message.content));
  const tools = document.createElement("div");
  tools.className = "tools";
  const last = number === current.messages.length - 1;
  if (message.role === "assistant") {
    tools.append(button("Copy", "Copy this answer", () => copy(message.content)));
    if (last) tools.append(button("Regenerate", "Regenerate this answer", regenerate));
  } else if (last) tools.append(button("Ask again", "", regenerate));
  if (!asking && tools.hasChildNodes()) made.append(tools);
  return made;
}

function show() {
  $("log").replaceChildren(...current.messages.map(article));
  $("log").scrollTop = $("log").scrollHeight;
  $("stop").hidden = !asking;
  $("send").disabled = Boolean(asking);
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    tell("Copied.");
  } catch {
    tell("This browser does not let the page copy.");
  }
}

function headers() {
  const key = sessionStorage.getItem("mobilellm.key");
  const json = { "Content-Type": "application/json" };
  return key ? { ...json, Authorization: `Bearer ${key}` } : json;
}

async function failure(response) {
  if (response.status === 401) {
    openSettings();
    return "The server wants an API key: enter it in the settings.";
  }
  const said = await response.json().catch(() => ({}));
  return said.error?.message ?? `The server answered with status ${response.status}.`;
}

// The values of a stream of server-sent events.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  while (true) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function answer() {
  const here = current;
  const settings = stored("settings", {});
  const system = settings.system ? [{ role: "system", content: settings.system }] : [];
  const said = here.messages.filter((each) => each.role !== "error");
  const asked = { model, stream: true, messages: [...system, ...said] };
  if (settings.temperature) asked.temperature = Number(settings.temperature);
  if (settings.tokens) asked.max_tokens = Number(settings.tokens);
  const mine = (asking = new AbortController());
  const made = { role: "assistant", content: "" };
  let error = "";
  tell("The model is answering.");
  $("log").setAttribute("aria-busy", "true"); // read out when it is whole
  show();
  try {
    if (!model) await findModel();
    asked.model = model;
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      body: JSON.stringify(asked),
      signal: mine.signal,
    });
    if (!response.ok) throw new Error(await failure(response));
    here.messages.push(made);
    if (here === current) show();
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const piece = event.choices[0]?.delta.content;
      if (!piece) continue;
      made.content += piece;
      if (here === current) grow(made);
    }
  } catch (caught) {
    if (caught.name !== "AbortError") error = caught.message || "The server is not there.";
  }
  if (asking === mine) asking = null;
  if (!made.content) here.messages = here.messages.filter((each) => each !== made);
  if (error) here.messages.push({ role: "error", content: error });
  if (here === current) {
    $("log").removeAttribute("aria-busy");
    keep();
    show();
    tell(error ? "There is no answer." : mine.signal.aborted ? "Stopped." : "The answer is there.");
  }
}

function grow(message) {
  const last = $("log").lastElementChild;
  const near = $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 80;
  last.replaceChildren(last.firstElementChild, ...body(message.content));
  if (near) $("log").scrollTop = $("log").scrollHeight;
}

function ask(event) {
  event?.preventDefault();
  const text = $("question").value.trim();
  if (!text || asking) return;
  $("question").value = "";
  current.messages = current.messages.filter((each) => each.role !== "error");
  current.messages.push({ role: "user", content: text });
  current.title ||= text.slice(0, 60);
  keep();
  answer();
}

function regenerate() {
  if (asking) return;
  while (current.messages.length && current.messages.at(-1).role !== "user") current.messages.pop();
  $("question").focus();
  answer();
}

function stop() {
  asking?.abort();
  asking = null;
}

async function findModel() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw new Error(await failure(response));
  model = (await response.json()).data[0].id;
  $("model").textContent = model;
}

function openSettings() {
  const settings = stored("settings", {});
  for (const name of ["system", "temperature", "tokens"]) $(name).value = settings[name] ?? "";
  $("key").value = sessionStorage.getItem("mobilellm.key") ?? "";
  if (!$("settings").open) $("settings").showModal();
}

function closeSettings() {
  const settings = {};
  for (const name of ["system", "temperature", "tokens"]) settings[name] = $(name).value.trim();
  store("settings", settings);
  sessionStorage.setItem("mobilellm.key", $("key").value);
  findModel().catch((error) => tell(error.message));
}

function setTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  $("theme").setAttribute("aria-pressed", String(dark));
}

$("ask").addEventListener("submit", ask);
$("stop").addEventListener("click", () => {
  stop();
  $("question").focus();
});
$("new").addEventListener("click", () => choose(fresh()));
$("open-settings").addEventListener("click", openSettings);
$("settings").addEventListener("close", closeSettings);
$("forget").addEventListener("click", () => {
  conversations = [];
  store("conversations", []);
  choose(fresh());
});
$("theme").addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme !== "dark";
  store("dark", dark);
  setTheme(dark);
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) ask(event);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && asking && !$("settings").open) stop();
});

setTheme(stored("dark", matchMedia("(prefers-color-scheme: dark)").matches));
showList();
show();
findModel().catch((error) => tell(error.message));
$("question").focus();
