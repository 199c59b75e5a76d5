"use strict";
// Shows how answers were decoded. A replay has steps, one for each forward pass:
//   {forward, length, starts: [place, ...], changes: [[place, text or null, probability or null], ...]}
// `length` tokens and masks of the answer are in sight; a text of null is a mask. All text goes to the page as text.

const given = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const ENDS = {
  eos: "ended by the model", length: "cut at its limit", stop: "ended before a stop text", filled: "gaps filled",
};
const LIVE_SCALE = 12; // forwards that the colours are for while nobody knows how many there will be

const LONG = 1000; // tokens of an answer from which on it would take too long to lay out all of them

function make(tag, kind, text) {
  const element = document.createElement(tag);
  if (kind) element.className = kind;
  if (text !== undefined) element.textContent = text;
  return element;
}

function count(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}

/** One answer: its prompt, its tokens after some number of steps, and what it took. */
class Pane {
  constructor(replay, named) {
    this.replay = replay;
    this.root = make("section", "pane");
    this.blocks = make("div", "blocks");
    this.text = make("p", "text");
    this.facts = make("p", "facts");
    if (named) this.root.append(make("h2", "", replay.label));
    if (replay.about) this.root.firstChild.append(make("small", "", replay.about));
    this.asked = make("p", "asked", replay.prompt);
    this.asked.hidden = Boolean(given.live); // a live page has it in its form
    for (const part of [this.asked, this.blocks, this.text]) part.dir = "auto"; // Hebrew and Arabic from the right
    this.root.append(this.asked, this.blocks, this.text, this.facts);
  }

  get steps() {
    return this.replay.steps;
  }

  get forwards() {
    const last = this.steps[this.steps.length - 1];
    return this.replay.forwards ?? Math.max(LIVE_SCALE, last ? last.forward : 0);
  }

  /** Shows the answer after `number` steps; `scale` is the forward that has the last colour. */
  show(number, scale) {
    const done = Math.min(number, this.steps.length);
    const cells = [], starts = new Set();
    // Before the first forward there are the masks that it reads.
    let length = (this.steps[0] ?? this.replay).length ?? 0, newest = null;
    for (const [place, text] of this.replay.given ?? []) cells[place] = {text};
    for (newest of this.steps.slice(0, done)) {
      cells.length = length = newest.length;
      for (const place of newest.starts) starts.add(place);
      for (const [place, text, chance] of newest.changes) {
        cells[place] = text === null ? undefined : {text, chance, forward: newest.forward};
      }
    }
    const open = [...starts].filter((place) => place < length).sort((a, b) => a - b);
    const edges = [...new Set([0, ...open, length])];
    const complete = done === this.steps.length && this.replay.finish;
    if (complete && !length) edges.push(0); // a frame for the terminator alone
    this.blocks.replaceChildren();
    this.blocks.classList.toggle("long", length > LONG);
    for (let block = 0; block + 1 < edges.length; block++) {
      const frame = make("div", "block");
      for (let place = edges[block]; place < edges[block + 1]; place++) {
        frame.append(this.cell(cells[place], scale, newest));
      }
      if (complete && this.replay.finish === "eos" && block + 2 === edges.length) frame.append(this.end());
      if (!complete && frame.querySelector(".mask")) frame.classList.add("open");
      this.blocks.append(frame);
    }
    this.tell(done, newest, complete);
  }

  cell(token, scale, newest) {
    if (!token) {
      const mask = make("span", "cell mask");
      mask.title = "masked";
      return mask;
    }
    const cell = make("span", token.forward ? "cell" : "cell given", token.text);
    if (token.forward) {
      const chance = token.chance ?? 1;
      cell.style.setProperty("--t", Math.min(1, (token.forward - 1) / Math.max(scale - 1, 1)));
      cell.style.setProperty("--p", chance);
      cell.title = `forward ${token.forward}` + (token.chance == null ? "" : `, ${(100 * chance).toFixed(1)} %`);
      cell.classList.toggle("new", token.forward === newest.forward);
      cell.append(make("small", "", token.forward));
    }
    return cell;
  }

  /** The place of the terminator, which is no part of the answer. */
  end() {
    const cell = make("span", "cell end", "■");
    cell.title = "the model ended its answer here";
    return cell;
  }

  tell(done, newest, complete) {
    const {text, tokens, forwards, auxiliary, seconds, finish} = this.replay;
    this.text.textContent = text ?? "";
    this.text.hidden = !(complete && text);
    this.facts.replaceChildren();
    if (complete) {
      const rate = (tokens / Math.max(forwards, 1)).toFixed(2);
      this.facts.append(
        make("b", "", count(forwards, "forward")), ` for ${count(tokens, "token")}: ${rate} tokens/forward, `,
        make("b", "", `${seconds.toFixed(3)} s`), `; ${ENDS[finish] ?? finish}`,
        auxiliary ? `; ${count(auxiliary, "forward")} of a second model` : "",
      );
    } else if (newest) {
      this.facts.append("forward ", make("b", "", newest.forward));
    } else {
      this.facts.append(this.replay.waits ? "waits for its turn" : "before the first forward");
    }
  }
}

// -- the slider, which moves all panes --------------------------------------------------------------------------------

let panes = [], position = 0, timer = null;
let follows = true; // whether the newest step is shown as it comes

function longest() {
  return Math.max(0, ...panes.map((pane) => pane.steps.length));
}

function show(where) {
  const last = longest();
  position = Math.max(0, Math.min(where, last));
  const scale = Math.max(1, ...panes.map((pane) => pane.forwards));
  for (const pane of panes) pane.show(position, scale);
  at("slider").max = last;
  at("slider").value = position;
  at("where").textContent = `step ${position} of ${last}`;
  at("controls").hidden = last === 0;
  fit();
}

function setPanes(replays, named) {
  panes = replays.map((replay) => new Pane(replay, named));
  at("panes").replaceChildren(...panes.map((pane) => pane.root));
  const recorded = replays.some((replay) => replay.steps.some((step) => step.changes.some((one) => one[2] !== null)));
  at("sureness").hidden = !recorded && !given.live;
}

function pause() {
  clearInterval(timer);
  timer = null;
  at("play").textContent = "▶\ufe0e";
  at("play").setAttribute("aria-label", "play");
}

function play() {
  if (timer) return pause();
  follows = false;
  if (position >= longest()) show(0);
  at("play").textContent = "❚❚";
  at("play").setAttribute("aria-label", "pause");
  const wait = Math.max(70, Math.min(600, 6000 / Math.max(longest(), 1)));
  timer = setInterval(() => {
    show(position + 1);
    if (position >= longest()) pause();
  }, wait);
}

function move(where) {
  pause();
  follows = where >= longest();
  show(where);
}

/** Makes the frame that a notebook shows the page in as high as the page. */
function fit() {
  if (window.frameElement) window.frameElement.height = document.body.scrollHeight + 2;
}

// -- a list of prompts to choose from ---------------------------------------------------------------------------------

let chosen = 0;

function choose(index) {
  pause();
  chosen = Math.max(0, Math.min(index, given.replays.length - 1));
  for (const [number, button] of [...at("list").children].entries()) {
    if (number === chosen) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
  setPanes([given.replays[chosen]], Boolean(given.replays[chosen].label));
  show(longest());
}

if (given.replays.length) {
  for (const [index, replay] of given.replays.entries()) {
    const button = make("button", "", replay.prompt || `answer ${index + 1}`);
    button.type = "button";
    button.dir = "auto";
    button.addEventListener("click", () => choose(index));
    at("list").append(button);
  }
  at("list").hidden = given.replays.length === 1;
  choose(0);
}

// -- questions to a server --------------------------------------------------------------------------------------------

let running = null;

function complain(text) {
  at("problem").textContent = text ?? "";
  at("problem").hidden = !text;
}

/** Yields the events of a stream of answers. */
async function* ask(body, path) {
  const headers = {"content-type": "application/json"};
  if (at("key").value) headers.authorization = `Bearer ${at("key").value}`;
  const reply = await fetch(path, {method: "POST", headers, body: JSON.stringify(body), signal: running.signal});
  if (!reply.ok) {
    if (reply.status === 401) at("key").focus();
    throw new Error((await reply.json()).error.message);
  }
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const {value, done} = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (event.startsWith("data: {")) yield JSON.parse(event.slice("data: ".length)); // not the closing [DONE]
    }
  }
}

/** Has one pane's answer decoded, and shows it as it comes. */
async function decode(pane) {
  const {model, chat} = given.live;
  const asked = chat ? {messages: [{role: "user", content: pane.replay.prompt}]} : {prompt: pane.replay.prompt};
  const body = {model, ...asked, stream: true, steps: true, sampler: pane.replay.label};
  if (at("limit").value) body.max_tokens = Number(at("limit").value);
  if (at("temperature").value) body.temperature = Number(at("temperature").value);
  pane.replay.waits = false;
  for await (const event of ask(body, chat ? "/v1/chat/completions" : "/v1/completions")) {
    if (event.error) throw new Error(event.error.message);
    for (const {step, took} of event.choices) {
      if (step) pane.steps.push(step);
      if (took) Object.assign(pane.replay, took);
    }
    show(follows ? longest() : position);
  }
}

async function generate() {
  if (running) return running.abort();
  const prompt = at("prompt").value;
  if (!prompt.trim()) return complain("Write a prompt first.");
  running = new AbortController();
  complain();
  pause();
  follows = true;
  at("go").textContent = "Stop";
  const names = [at("sampler").value, at("other").value].filter(Boolean);
  setPanes(names.map((label) => ({prompt, label, about: given.live.samplers[label], steps: [], waits: true})), true);
  show(0);
  try {
    for (const pane of panes) { // one after the other, so that each one's time is its own
      await decode(pane);
    }
  } catch (error) {
    if (error.name === "TypeError") complain("The server does not answer: is it running?");
    else if (error.name !== "AbortError") complain(error.message);
  }
  running = null;
  at("go").textContent = "Generate";
  show(follows ? longest() : position);
}

if (given.live) {
  at("ask").hidden = false;
  at("locked").hidden = !given.live.locked;
  at("prompt").focus();
  at("panes").append(make("p", "hint", "Generate (Ctrl-Enter) shows here how the answer is decoded, forward by forward."));
  for (const name of Object.keys(given.live.samplers)) {
    at("sampler").append(new Option(name, name));
    at("other").append(new Option(name, name));
  }
  at("other").prepend(new Option("none", "", true, true));
  at("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    generate();
  });
}

// -- buttons and keys -------------------------------------------------------------------------------------------------

const MOVES = {
  Home: () => move(0), End: () => move(longest()), ArrowLeft: () => move(position - 1),
  ArrowRight: () => move(position + 1), ArrowUp: () => choose(chosen - 1), ArrowDown: () => choose(chosen + 1),
  " ": play, d: theme,
};

function theme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
}

at("slider").addEventListener("input", () => move(Number(at("slider").value)));
at("first").addEventListener("click", () => move(0));
at("back").addEventListener("click", () => move(position - 1));
at("next").addEventListener("click", () => move(position + 1));
at("play").addEventListener("click", play);
at("theme").addEventListener("click", theme);
window.addEventListener("resize", fit);
document.addEventListener("keydown", (event) => {
  if (given.live && event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    if (!running) generate();
    return;
  }
  if (event.key === "Escape" && running) return running.abort();
  const field = event.target.closest("textarea, select, input" + (event.key === " " ? ", button" : ""));
  const types = field && field.id !== "slider";
  const upOrDown = event.key === "ArrowUp" || event.key === "ArrowDown";
  if (types || event.ctrlKey || event.metaKey || event.altKey || (upOrDown && given.replays.length < 2)) return;
  const act = MOVES[event.key];
  if (!act) return;
  event.preventDefault();
  act();
});
