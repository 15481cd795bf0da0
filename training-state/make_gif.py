"""make_gif.py CHECKOUT OUTPUT: docs/answers.gif, of real answers; words appear one by one."""
import sys, textwrap
from pathlib import Path
import matplotlib, torch
from PIL import Image, ImageDraw, ImageFont
root, output = Path(sys.argv[1]), sys.argv[2]
from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
TALKS = [
    ("examples/scene.png", ["Read the sign.", "What is top right?", "Is there a dog?", "Describe the picture."]),
    ("examples/shapes.png", ["How many shapes are there?", "What is below the star?"]),
]
model = FlashSlothForConditionalGeneration.from_pretrained(root, dtype=torch.float32).eval()
processor = FlashSlothProcessor.from_pretrained(root)
fonts = Path(matplotlib.get_data_path()) / "fonts/ttf"
plain, bold = (ImageFont.truetype(str(fonts / f"DejaVuSansMono{n}.ttf"), 16) for n in ("", "-Bold"))
W, H, SIDE = 760, 288, 256
frames, times = [], []
def frame(image, lines, ms):
    canvas = Image.new("RGB", (W, H), "#fcfcfc")
    canvas.paste(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (16, 16))
    draw, y = ImageDraw.Draw(canvas), 18
    for kind, text in lines:
        for row in textwrap.wrap(("> " if kind == "q" else "") + text, 46) or [""]:
            draw.text((292, y), row, font=plain if kind == "q" else bold, fill="#5b5b50" if kind == "q" else "#0b5a2e")
            y += 24
        if kind == "a": y += 14
    assert y < H, y
    frames.append(canvas); times.append(ms)
for file, questions in TALKS:
    image, messages, lines = Image.open(root / file).convert("RGB"), [], []
    for number, question in enumerate(questions):
        content = [{"type": "image", "image": image}] if number == 0 else []
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
        inputs = processor.encode_conversations([messages])
        out = model.generate(**inputs, max_new_tokens=96, do_sample=False)
        text = processor.post_process_image_text_to_text(out[:, inputs["input_ids"].shape[1]:])[0]
        print(file, question, text)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": text}]})
        lines.append(("q", question)); frame(image, lines, 900)
        words = text.split()
        for n in range(1, len(words)):
            frame(image, [*lines, ("a", " ".join(words[:n]))], 110)
        lines.append(("a", text)); frame(image, lines, 3000 if question == questions[-1] else 1500)
frames[0].save(output, save_all=True, append_images=frames[1:], duration=times, loop=0, optimize=True)
print(len(frames), Path(output).stat().st_size)
