/** The page: pictures, questions, answers. The model runs in worker.ts. */

import scene from "../../examples/scene.png";
import shapes from "../../examples/shapes.png";
import "./style.css";
import { Drawing, type Tool } from "./drawing";
import { colourHeat, heatMap } from "./heat";
import type { Timings } from "./model";
import type { ModelInfo, Reply, Request, ShownImage } from "./protocol";

const DEFAULT_MODEL = "./model/";
const EXAMPLES = [
  { image: scene, description: "a star, a rocket, a sign and a turtle", question: "Read the sign." },
  { image: scene, description: "a star, a rocket, a sign and a turtle", question: "What is in the top right corner?" },
  { image: shapes, description: "four shapes", question: "Describe the picture." },
  { image: shapes, description: "four shapes", question: "How many shapes are there?" },
];
const COLOURS = {
  red: "rgb(214, 36, 36)",
  orange: "rgb(244, 128, 16)",
  yellow: "rgb(250, 222, 40)",
  green: "rgb(36, 148, 60)",
  blue: "rgb(36, 84, 208)",
  purple: "rgb(132, 44, 164)",
  black: "rgb(22, 22, 22)",
  white: "rgb(248, 248, 248)",
};
const TOOLS: Record<Tool, string> = {
  pen: "Pen",
  outline: "Filled pen",
  star: "Star",
  circle: "Circle",
  square: "Square",
  triangle: "Triangle",
  heart: "Heart",
  cross: "Cross",
};
const SOURCES = ["picture", "draw", "camera"] as const;
type Source = (typeof SOURCES)[number];

const byId = <T extends HTMLElement>(id: string): T => document.getElementById(id) as T;
const shownCanvas = byId<HTMLCanvasElement>("shown");
const drawingCanvas = byId<HTMLCanvasElement>("drawing");
const overlay = byId<HTMLCanvasElement>("overlay");
const video = byId<HTMLVideoElement>("video");
const question = byId<HTMLTextAreaElement>("question");
const askButton = byId<HTMLButtonElement>("ask");
const stopButton = byId<HTMLButtonElement>("stop");
const forgetButton = byId<HTMLButtonElement>("forget");
const view = byId<HTMLSelectElement>("view");
const log = byId<HTMLOListElement>("log");

const parameters = new URLSearchParams(location.search);
const worker = new Worker(new URL("./worker.ts", import.meta.url), { type: "module" });
const send = (request: Request): void => worker.postMessage(request);

/** An answer that is being written; `text` is what is not shown yet. */
interface Answer {
  element: HTMLElement;
  question: string;
  text?: string;
  attention?: Float32Array;
}

/** What the page knows. */
const state: {
  model?: ModelInfo;
  source: Source;
  /** The image that the model has encoded, and the revision of the drawing if it is one. */
  image?: ShownImage & { drawing?: number };
  /** A picture that is being encoded, and what to do then. */
  waiting?: { drawing?: number; then?: () => void };
  /** The answer that is being written. */
  answer?: Answer;
  /** Attention of the question whose map is shown. */
  attention?: Float32Array;
} = { source: "picture" };

const drawing = new Drawing(drawingCanvas, () => showView("picture"));

worker.onmessage = ({ data }: MessageEvent<Reply>) => {
  switch (data.type) {
    case "progress":
      return showProgress(data);
    case "loaded":
      return onLoaded(data);
    case "shown":
      return onShown(data);
    case "part":
      return onPart(data.text, data.attention);
    case "answered":
      onPart(data.text, data.attention);
      return onAnswered(data.text, data.timings);
    case "error":
      return onError(data.during, data.message);
  }
};
worker.onerror = (event) => onError("load", `The page cannot start: ${event.message || "a file of it is missing"}.`);

// Loading

function showProgress({ loaded, total, what }: { loaded: number; total: number; what: string }): void {
  const bar = byId<HTMLProgressElement>("progress");
  if (total) bar.value = loaded / total;
  else bar.removeAttribute("value");
  const size = total ? `: ${megabytes(loaded)} of ${megabytes(total)} MB` : " …";
  byId("loading-text").textContent = `${what}${size}`;
}

function onLoaded(info: ModelInfo): void {
  state.model = info;
  byId("loading").hidden = true;
  const sizes = `${megabytes(info.modelBytes)} MB of weights and ${megabytes(info.runtimeBytes)} MB of WebAssembly`;
  byId("about").textContent =
    `${info.backend}. ${sizes}, ready after ${info.seconds.toFixed(1)} s. ` +
    "The browser keeps them: the page also works without a network.";
  byId<HTMLInputElement>("temperature").value = String(info.defaults.temperature);
  byId<HTMLInputElement>("top-p").value = String(info.defaults.topP);
  document.body.dataset.ready = "true";
  updateButtons();
}

function onError(during: Request["type"], message: string): void {
  if (during === "load") byId("loading").hidden = true;
  if (during === "show") state.waiting = undefined;
  if (state.answer) {
    if (during === "ask" && !question.value) question.value = state.answer.question;
    state.answer.element.closest("li")!.remove();
    state.answer = undefined;
  }
  showError(message);
  updateButtons();
}

function showError(message: string): void {
  const element = byId("error");
  element.textContent = message;
  element.hidden = !message;
}

// Pictures

function showPicture(image: Blob | ImageData, then?: () => void): void {
  showError("");
  state.waiting = { drawing: image instanceof Blob ? undefined : drawing.revision, then };
  updateButtons();
  send({ type: "stop" });
  send({ type: "show", image });
}

function onShown(image: ShownImage): void {
  const { drawing: revision, then } = state.waiting ?? {};
  state.image = { ...image, drawing: revision };
  state.waiting = undefined;
  state.attention = undefined;
  log.replaceChildren();
  shownCanvas.width = image.bitmap.width;
  shownCanvas.height = image.bitmap.height;
  shownCanvas.getContext("2d")!.drawImage(image.bitmap, 0, 0);
  if (revision === undefined) select("picture");
  byId("timings").textContent = `Picture encoded in ${milliseconds(image.seconds)}.`;
  byId("timings").dataset.encoded = String(image.seconds);
  showView("picture");
  updateButtons();
  then?.();
}

function select(source: Source): void {
  state.source = source;
  for (const name of SOURCES) {
    const tab = byId(`tab-${name}`);
    tab.setAttribute("aria-selected", String(name === source));
    tab.tabIndex = name === source ? 0 : -1;
    byId(`source-${name}`).hidden = name !== source;
  }
  if (source === "camera") void startCamera();
  else stopCamera();
  showView("picture");
}

function showView(name: string): void {
  view.value = name;
  const { image, source, model } = state;
  const isDrawn = image?.drawing !== undefined;
  const isCurrent = image !== undefined && (source === "draw" ? image.drawing === drawing.revision : !isDrawn);
  shownCanvas.hidden = source !== "picture" || !isCurrent;
  drawingCanvas.hidden = source !== "draw";
  video.hidden = source !== "camera";
  byId("empty").hidden = source !== "picture" || isCurrent;
  byId("view-part").hidden = source === "camera" || !isCurrent;
  view.querySelector<HTMLOptionElement>("[value=question]")!.disabled = !state.attention;
  const weights = name === "pooling" ? image?.pooling : state.attention;
  overlay.hidden = name === "picture" || !isCurrent || !weights || !model;
  if (overlay.hidden) return;
  overlay.width = image!.bitmap.width;
  overlay.height = image!.bitmap.height;
  const { width, height } = overlay;
  const heat = heatMap(weights!, model!.numTiles, model!.patchSize, width, height);
  overlay.getContext("2d")!.putImageData(new ImageData(colourHeat(heat), width, height), 0, 0);
}

async function startCamera(): Promise<void> {
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    if (state.source !== "camera") return stream.getTracks().forEach((track) => track.stop());
    video.srcObject = stream;
    await video.play();
  } catch (error) {
    const isRefused = error instanceof DOMException && error.name === "NotAllowedError";
    showError(
      isRefused
        ? "The browser may not use the camera; allow it in the address bar, or choose a picture."
        : "There is no camera that this page can use; choose a picture instead.",
    );
  }
}

function stopCamera(): void {
  const stream = video.srcObject as MediaStream | null;
  stream?.getTracks().forEach((track) => track.stop());
  video.srcObject = null;
}

function takePicture(): void {
  if (!video.videoWidth) return showError("The camera shows nothing yet; wait a moment.");
  const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
  canvas.getContext("2d")!.drawImage(video, 0, 0);
  void canvas.convertToBlob().then((blob) => showPicture(blob));
}

function chooseFile(files: FileList | undefined | null): void {
  const file = files?.[0];
  if (file) showPicture(file);
}

// Questions

function ask(): void {
  const text = question.value.trim();
  if (!state.model || state.answer || state.waiting) return;
  if (!text) return showError("Type a question first.");
  if (state.source === "draw") {
    if (drawing.revision === 0) return showError("Draw something first.");
    if (state.image?.drawing !== drawing.revision) return showPicture(drawing.pixels, ask);
  } else if (!state.image || state.image.drawing !== undefined) {
    return showError("Choose, draw or take a picture first.");
  }
  showError("");
  question.value = "";
  const item = document.createElement("li");
  const asked = document.createElement("p");
  asked.className = "asked";
  asked.textContent = text;
  const element = document.createElement("p");
  element.className = "answer";
  item.append(asked, element);
  log.append(item);
  item.scrollIntoView({ block: "nearest" });
  state.answer = { element, question: text };
  updateButtons();
  const setting = (id: string) => byId<HTMLInputElement>(id).valueAsNumber;
  send({
    type: "ask",
    question: text,
    settings: {
      maxNewTokens: Math.max(1, setting("length") || 256),
      temperature: Math.max(0, setting("temperature") || 0),
      topP: setting("top-p") || 1,
      topK: state.model.defaults.topK,
    },
  });
}

/** Show the answer so far, once a frame: tokens may come faster than the page is laid out, and "stop" must not wait. */
function onPart(text: string, attention: Float32Array | undefined): void {
  const { answer } = state;
  if (!answer) return;
  answer.attention ??= attention;
  if (answer.text === undefined) requestAnimationFrame(() => showText(answer));
  answer.text = text;
}

function showText(answer: Answer): void {
  if (answer.text === undefined) return;
  answer.element.textContent = answer.text;
  answer.text = undefined;
  answer.element.scrollIntoView({ block: "nearest" });
}

function onAnswered(text: string, timings: Timings): void {
  const { answer } = state;
  if (!answer) return;
  state.answer = undefined;
  showText(answer);
  if (!text) answer.element.textContent = "(no answer)";
  const { attention } = answer;
  if (attention) {
    state.attention = attention;
    const button = document.createElement("button");
    button.className = "looked";
    button.textContent = "Where it looked";
    button.onclick = () => {
      state.attention = attention;
      showView("question");
    };
    answer.element.after(button);
    showView(view.value);
  }
  const rate = timings.perToken ? `, ${(1 / timings.perToken).toFixed(0)} tokens per second` : "";
  byId("timings").textContent =
    `First token after ${milliseconds(timings.firstToken)}${rate}. ` +
    `${timings.numTokens} token${timings.numTokens === 1 ? "" : "s"}; ${timings.numComputed} of the prompt computed, ${timings.numCached} from the cache.`;
  byId("timings").dataset.json = JSON.stringify(timings);
  byId("status").textContent = `Answer: ${text}`;
  updateButtons();
}

function forget(): void {
  send({ type: "forget" });
  log.replaceChildren();
  state.attention = undefined;
  showView("picture");
  byId("status").textContent = "New conversation";
  updateButtons();
  question.focus();
}

const megabytes = (bytes: number): string => (bytes / 1e6).toFixed(1);
const milliseconds = (seconds: number): string => `${(seconds * 1000).toFixed(0)} ms`;

function updateButtons(): void {
  const isBusy = Boolean(state.answer ?? state.waiting);
  askButton.disabled = !state.model || isBusy;
  stopButton.disabled = !state.answer;
  forgetButton.disabled = isBusy || !log.childElementCount;
}

// The page's parts

function addRadios(
  fieldset: HTMLElement,
  name: string,
  values: Record<string, string>,
  add: (input: HTMLInputElement, value: string) => void,
): void {
  for (const [value, label] of Object.entries(values)) {
    const element = document.createElement("label");
    const input = document.createElement("input");
    input.type = "radio";
    input.name = name;
    input.value = value;
    const text = document.createElement("span");
    text.textContent = label;
    element.append(input, text);
    fieldset.append(element);
    add(input, value);
  }
}

addRadios(
  byId("colours"),
  "colour",
  Object.fromEntries(Object.keys(COLOURS).map((name) => [name, name])),
  (input, name) => {
    const colour = COLOURS[name as keyof typeof COLOURS];
    input.parentElement!.style.setProperty("--colour", colour);
    input.parentElement!.title = name;
    input.onchange = () => (drawing.colour = colour);
  },
);
addRadios(byId("tools"), "tool", TOOLS, (input, tool) => {
  input.onchange = () => (drawing.tool = tool as Tool);
});
byId("colours").querySelector<HTMLInputElement>("input")!.click();
byId("tools").querySelector<HTMLInputElement>("[value=outline]")!.click();

for (const { image, description, question: text } of EXAMPLES) {
  const button = document.createElement("button");
  const picture = document.createElement("img");
  picture.src = image;
  picture.alt = "";
  const label = document.createElement("span");
  label.textContent = text;
  button.append(picture, label);
  button.setAttribute("aria-label", `Example with ${description}: ${text}`);
  button.onclick = async () => {
    question.value = text;
    showPicture(await (await fetch(image)).blob());
  };
  const item = document.createElement("li");
  item.append(button);
  byId("examples").append(item);
}

for (const [index, name] of SOURCES.entries()) {
  const tab = byId<HTMLButtonElement>(`tab-${name}`);
  tab.onclick = () => select(name);
  tab.onkeydown = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: SOURCES.length - 1 }[event.key];
    if (!step) return;
    const next = SOURCES[(index + step) % SOURCES.length];
    select(next);
    byId(`tab-${next}`).focus();
  };
}

byId<HTMLInputElement>("file").onchange = (event) => {
  const input = event.target as HTMLInputElement;
  chooseFile(input.files);
  input.value = "";
};
byId<HTMLInputElement>("pen-width").oninput = (event) => {
  drawing.width = (event.target as HTMLInputElement).valueAsNumber;
};
byId("undo").onclick = () => drawing.undo();
byId("erase").onclick = () => drawing.clear();
byId("take").onclick = takePicture;
byId("form").onsubmit = (event) => {
  event.preventDefault();
  ask();
};
stopButton.onclick = () => send({ type: "stop" });
forgetButton.onclick = forget;
view.onchange = () => showView(view.value);
question.onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
};
drawingCanvas.addEventListener("cursor", (event) => {
  const place = (event as CustomEvent<{ x: number; y: number } | undefined>).detail;
  const cursor = byId("cursor");
  cursor.hidden = !place;
  if (place) Object.assign(cursor.style, { left: `${place.x * 100}%`, top: `${place.y * 100}%` });
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") send({ type: "stop" });
});
document.addEventListener("paste", (event) => {
  const files = event.clipboardData?.files;
  if (!files?.length) return;
  event.preventDefault();
  chooseFile(files);
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  if (event.dataTransfer?.files.length) chooseFile(event.dataTransfer.files);
  else showError("Only picture files can be dropped here; save the picture first, or copy and paste it.");
});

const chosen = parameters.get("model") ?? DEFAULT_MODEL;
byId("model-name").textContent = chosen === DEFAULT_MODEL ? "" : `(${chosen})`;
byId("note").hidden = chosen !== DEFAULT_MODEL;
const numThreads = Number(parameters.get("threads")) || null;
send({ type: "load", model: chosen, page: document.baseURI, backend: parameters.get("backend"), numThreads });
select("picture");
updateButtons();
if (import.meta.env.PROD) void navigator.serviceWorker?.register("./sw.js").catch(() => {});
