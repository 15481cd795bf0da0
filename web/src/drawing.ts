/** A canvas to draw on, with pointer or keyboard. */

export const SIDE = 384; // pixels
export const PAPER = "rgb(255, 255, 255)";
const MIN_RADIUS = 12;
const DEFAULT_RADIUS = 62;
const KEYBOARD_STEP = 12;
const MAX_UNDO = 30;

export type Tool = "pen" | "outline" | Shape;
export type Shape = keyof typeof SHAPES;

interface Point {
  x: number;
  y: number;
}

/** Points of a polygon, from -1 to 1; y points down. */
const polygon = (numPoints: number, radiusOf: (index: number) => number): Point[] =>
  Array.from({ length: numPoints }, (_, index) => {
    const angle = (index / numPoints) * 2 * Math.PI - Math.PI / 2;
    return { x: radiusOf(index) * Math.cos(angle), y: radiusOf(index) * Math.sin(angle) };
  });

const heart = (): Point[] =>
  Array.from({ length: 60 }, (_, index) => {
    const t = (index / 60) * 2 * Math.PI;
    const y = 13 * Math.cos(t) - 5 * Math.cos(2 * t) - 2 * Math.cos(3 * t) - Math.cos(4 * t);
    return { x: Math.sin(t) ** 3, y: -(y + 2.5) / 15 };
  });

const CROSS = [-1, -0.34, 0.34, 1];
const [A, B, C, D] = CROSS;

const SHAPES = {
  star: polygon(10, (index) => (index % 2 ? 0.42 : 1)),
  circle: polygon(72, () => 1),
  square: [
    { x: -0.9, y: -0.9 },
    { x: 0.9, y: -0.9 },
    { x: 0.9, y: 0.9 },
    { x: -0.9, y: 0.9 },
  ],
  triangle: [
    { x: 0, y: -1 },
    { x: 1, y: 0.9 },
    { x: -1, y: 0.9 },
  ],
  heart: heart(),
  cross: [
    { x: B, y: A },
    { x: C, y: A },
    { x: C, y: B },
    { x: D, y: B },
    { x: D, y: C },
    { x: C, y: C },
    { x: C, y: D },
    { x: B, y: D },
    { x: B, y: C },
    { x: A, y: C },
    { x: A, y: B },
    { x: B, y: B },
  ],
};

const isShape = (tool: Tool): tool is Shape => tool in SHAPES;

export class Drawing {
  tool: Tool = "pen";
  colour = "#000";
  width = 12;
  /** Changes with every stroke; 0 if there is none. */
  revision = 0;

  private readonly context: CanvasRenderingContext2D;
  private readonly undoable: { pixels: ImageData; revision: number }[] = [];
  private numChanges = 0;
  private path: Point[] = [];
  private cursor: Point | undefined;
  private before: ImageData | undefined;

  /**
   * @param canvas The canvas; it gets focus by Tab.
   * @param onChange Called when a stroke begins, and after every change.
   */
  constructor(
    private readonly canvas: HTMLCanvasElement,
    private readonly onChange: () => void,
  ) {
    canvas.width = canvas.height = SIDE;
    this.context = canvas.getContext("2d", { willReadFrequently: true })!;
    this.fillPaper();
    canvas.addEventListener("pointerdown", (event) => this.begin(event));
    canvas.addEventListener("pointermove", (event) => this.extend(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => this.end());
    canvas.addEventListener("keydown", (event) => this.onKey(event));
    canvas.addEventListener("blur", () => this.endKeyboard());
  }

  get pixels(): ImageData {
    this.endKeyboard();
    return this.context.getImageData(0, 0, SIDE, SIDE);
  }

  clear(): void {
    this.endKeyboard();
    if (this.revision === 0) return;
    this.remember();
    this.fillPaper();
    this.revision = 0;
    this.onChange();
  }

  undo(): void {
    this.endKeyboard();
    const last = this.undoable.pop();
    if (!last) return;
    this.context.putImageData(last.pixels, 0, 0);
    this.revision = last.revision;
    this.onChange();
  }

  private fillPaper(): void {
    this.context.fillStyle = PAPER;
    this.context.fillRect(0, 0, SIDE, SIDE);
  }

  private remember(): void {
    this.undoable.push({ pixels: this.context.getImageData(0, 0, SIDE, SIDE), revision: this.revision });
    if (this.undoable.length > MAX_UNDO) this.undoable.shift();
  }

  private toPoint(event: PointerEvent): Point {
    const box = this.canvas.getBoundingClientRect();
    return {
      x: ((event.clientX - box.left) / box.width) * SIDE,
      y: ((event.clientY - box.top) / box.height) * SIDE,
    };
  }

  private begin(event: PointerEvent): void {
    if (event.button !== 0) return;
    event.preventDefault();
    this.canvas.focus();
    this.endKeyboard();
    this.canvas.setPointerCapture(event.pointerId);
    this.beginAt(this.toPoint(event));
  }

  private beginAt(point: Point): void {
    this.remember();
    this.before = this.undoable.at(-1)!.pixels;
    this.path = [point];
    this.revision = ++this.numChanges;
    this.paint();
    this.onChange();
  }

  private extend(event: PointerEvent): void {
    if (!this.before || this.cursor) return;
    this.path.push(...event.getCoalescedEvents().map((part) => this.toPoint(part)), this.toPoint(event));
    this.paint();
  }

  private end(): void {
    if (!this.before) return;
    if (this.tool === "outline" && this.path.length > 2) this.paint(true);
    this.before = undefined;
    this.onChange();
  }

  /** Draw the stroke from its beginning. */
  private paint(isFilled = false): void {
    const { context, path } = this;
    context.putImageData(this.before!, 0, 0);
    context.fillStyle = context.strokeStyle = this.colour;
    context.lineWidth = this.width;
    context.lineCap = context.lineJoin = "round";
    context.beginPath();
    if (isShape(this.tool)) {
      const [centre, edge] = [path[0], path.at(-1)!];
      const distance = Math.hypot(edge.x - centre.x, edge.y - centre.y);
      const radius = distance < MIN_RADIUS ? DEFAULT_RADIUS : distance;
      for (const { x, y } of SHAPES[this.tool]) context.lineTo(centre.x + x * radius, centre.y + y * radius);
      context.closePath();
      context.fill();
      return;
    }
    context.moveTo(path[0].x, path[0].y);
    for (const { x, y } of path) context.lineTo(x, y);
    if (isFilled) {
      context.closePath();
      context.fill();
    }
    context.stroke();
  }

  /** Arrows move a cursor; Space puts a shape, or puts the pen down and lifts it. */
  private onKey(event: KeyboardEvent): void {
    const moves: Record<string, [number, number]> = {
      ArrowLeft: [-1, 0],
      ArrowRight: [1, 0],
      ArrowUp: [0, -1],
      ArrowDown: [0, 1],
    };
    const move = moves[event.key];
    if (!move && event.key !== " " && event.key !== "Enter") return;
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const last = this.cursor ?? { x: SIDE / 2, y: SIDE / 2 };
    if (move) {
      const step = event.shiftKey ? KEYBOARD_STEP / 4 : KEYBOARD_STEP;
      const clamp = (value: number) => Math.min(Math.max(value, 0), SIDE);
      this.moveCursor({ x: clamp(last.x + move[0] * step), y: clamp(last.y + move[1] * step) });
      return;
    }
    if (this.before) this.end();
    else {
      this.beginAt(last);
      if (isShape(this.tool)) this.end();
    }
    this.moveCursor(last);
  }

  private moveCursor(point: Point): void {
    this.cursor = point;
    if (this.before) {
      this.path.push(point);
      this.paint();
    }
    this.canvas.dispatchEvent(new CustomEvent("cursor", { detail: { x: point.x / SIDE, y: point.y / SIDE } }));
  }

  private endKeyboard(): void {
    if (!this.cursor) return;
    this.end();
    this.cursor = undefined;
    this.canvas.dispatchEvent(new CustomEvent("cursor", { detail: undefined }));
  }
}
