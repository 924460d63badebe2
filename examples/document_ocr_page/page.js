// Sends files, asks until they are read, and shows what was found: text beside picture, each word with its box.

const LARGEST_FILE = 10_000_000; // bytes, as the server has it
const AGAIN = 2000; // milliseconds until something is tried again
const TRIES = 5; // at a server that cannot be reached, or loses what it has

const STATES = {
  queued: "Waiting for its turn…",
  running: "Reading…",
  retrying: "Reading it once more…",
};

const find = (selector, within = document) => within.querySelector(selector);
const made = (template) => find(template).content.cloneNode(true).firstElementChild;
const pause = (time) => new Promise((resolve) => setTimeout(resolve, time));
const counted = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

class Refused extends Error {} // trying again would not help

// --- one document ------------------------------------------------------

class Document {
  constructor(file) {
    this.file = file;
    this.card = made("#document");
    this.removed = new AbortController();
    find("h2", this.card).textContent = file.name;
    find("progress", this.card).setAttribute("aria-label", `Reading ${file.name}`);
    const remove = find(".remove", this.card);
    remove.setAttribute("aria-label", `Remove ${file.name}`);
    remove.addEventListener("click", () => this.remove());
    find(".again", this.card).addEventListener("click", () => this.read());
  }

  async read() {
    this.turn("working");
    try {
      this.say("Sending…");
      const { call_id } = await (await this.ask(`documents?name=${encodeURIComponent(this.file.name)}`, await this.content())).json();
      let answer;
      while ((answer = await this.ask(`documents/${call_id}`)).status === 202) {
        const { state, waiting_for } = await answer.json(); // it took a second to say so
        this.say(waiting_for ? `Waiting: ${waiting_for}` : STATES[state] ?? "Reading…");
      }
      this.show(call_id, (await answer.json()).pages);
    } catch (error) {
      if (this.removed.signal.aborted) return;
      this.turn("wrong");
      find(".again", this.card).hidden = error instanceof Refused;
      this.say(error.message);
    }
  }

  async content() {
    if (this.file.size > LARGEST_FILE) throw new Refused(`This file is larger than ${LARGEST_FILE / 1e6} MB.`);
    try {
      return await this.file.arrayBuffer();
    } catch {
      throw new Refused("This file cannot be read: is it a folder, or was it changed or deleted?");
    }
  }

  // An answer of the server. While nobody can give one, it is asked again: what is sent twice is only read twice.
  async ask(path, body) {
    for (let tries = 1; ; tries++) {
      const options = { method: body ? "POST" : "GET", body, signal: this.removed.signal };
      const answer = await fetch(path, options).catch(() => null);
      this.removed.signal.throwIfAborted();
      if (answer?.ok) return answer;
      const lost = !answer || answer.status === 502;
      if (answer?.status !== 503 && (!lost || tries === TRIES)) throw await failure(answer);
      this.say(answer ? "No worker can take it just now. Trying again…" : "The server cannot be reached. Trying again…");
      await pause(AGAIN);
    }
  }

  // --- what is seen ---

  turn(state) {
    this.card.className = state;
    find("progress", this.card).hidden = state !== "working";
    find(".again", this.card).hidden = true;
  }

  say(text) {
    const state = find(".state", this.card);
    if (state.textContent === text) return;
    state.textContent = text;
    find("#news").textContent = `${this.file.name}: ${text}`;
  }

  show(call, pages) {
    const words = pages.reduce((sum, page) => sum + page.words.length, 0);
    const shown = pages.map((page, number) =>
      this.page(page, `documents/${call}/pages/${number}`, `Page ${number + 1}`),
    );
    find(".pages", this.card).replaceChildren(...shown);
    this.turn("done");
    this.say(`${counted(pages.length, "page")}, ${counted(words, "word")}`);
  }

  page({ text, words, width, height }, picture, title) {
    const section = made("#page");
    const image = find("img", section);
    Object.assign(image, { src: picture, width, height, alt: `${title} of ${this.file.name}` });
    find("svg", section).setAttribute("viewBox", `0 0 ${width} ${height}`);
    find("h3", section).textContent = title;
    const shown = find("pre", section);
    const between = text.split(/\S+/).slice(1);
    words.forEach(({ text: word, box }, number) => {
      const span = document.createElement("span");
      span.textContent = word;
      shown.append(span, between[number]);
      find("svg", section).append(boxed(box, span));
    });
    if (!text) shown.textContent = "No text was found on this page.";
    const copy = find(".copy", section);
    copy.hidden = !text;
    copy.setAttribute("aria-label", `Copy text of ${title.toLowerCase()}`);
    copy.addEventListener("click", () => this.copy(shown, copy));
    return section;
  }

  async copy(text, button) {
    const copied = await navigator.clipboard?.writeText(text.textContent.trimEnd()).then(() => true, () => false);
    if (!copied) getSelection().selectAllChildren(text); // a page without HTTPS may not write to the clipboard
    const words = copied ? "Copied" : "Selected: now copy it";
    button.textContent = find("#news").textContent = words;
    await pause(AGAIN);
    button.textContent = "Copy text";
  }

  remove() {
    this.removed.abort();
    this.card.remove();
    find("#news").textContent = `${this.file.name} is removed`;
    find("#files").focus();
  }
}

// The box of a word in the picture, with some air around it; pointing at one of both shows the other.
function boxed([left, top, width, height], word) {
  const air = 3;
  const sides = { x: left - air, y: top - air, width: width + 2 * air, height: height + 2 * air, rx: air };
  const box = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  for (const [name, value] of Object.entries(sides)) box.setAttribute(name, value);
  const mark = (event) => [box, word].forEach((each) => each.classList.toggle("same", event.type === "pointerenter"));
  for (const each of [box, word]) {
    each.addEventListener("pointerenter", mark);
    each.addEventListener("pointerleave", mark);
  }
  return box;
}

// What a server's answer, or that there is none, means to a person.
async function failure(answer) {
  if (!answer) return new Error("The server cannot be reached.");
  const text = await answer.text();
  let reason = text || `The server answered ${answer.status}.`;
  try {
    reason = JSON.parse(text).detail;
  } catch {
    // the mesh itself answers in plain text
  }
  return answer.status < 500 ? new Refused(reason) : new Error(reason);
}

// --- files on their way in ---------------------------------------------

function read(files) {
  const added = [...files].map((file) => new Document(file));
  find("#documents").prepend(...added.map((one) => one.card));
  for (const one of added) one.read();
}

const drop = find("#drop");
const chosen = find("#files");

chosen.addEventListener("change", () => {
  read(chosen.files);
  chosen.value = ""; // or the same file could not be chosen again
});

find("#sample").addEventListener("click", async () => {
  const picture = await (await fetch("receipt.png")).blob();
  read([new File([picture], "receipt.png", { type: picture.type })]);
});

addEventListener("dragover", (event) => {
  event.preventDefault();
  drop.classList.add("over");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) drop.classList.remove("over");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  read(event.dataTransfer.files);
});
addEventListener("paste", (event) => read(event.clipboardData.files));
