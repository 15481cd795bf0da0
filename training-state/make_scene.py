"""make_scene.py PACKAGE FONT OUTPUT [THING]: examples/scene.png: a star, a thing of fxemoji's style, a sign."""
import io, json, math, sys
from pathlib import Path
import resvg_py
from PIL import Image, ImageDraw, ImageFont
package, font, output = sys.argv[1:4]
thing = sys.argv[4] if len(sys.argv) > 4 else "cat"
other = sys.argv[5] if len(sys.argv) > 5 else "turtle"
icons = json.loads((Path(package) / "icons.json").read_text())["icons"]
def icon(name, x, y, side, flip=False):
    t = f"translate({x} {y}) scale({side/512})" if not flip else f"translate({x+side} {y}) scale({-side/512} {side/512})"
    return f'<g transform="{t}">{icons[name]["body"]}</g>'
def star(cx, cy, r):
    p = [(cx + k * math.sin(math.pi * i / 5 + .1), cy - k * math.cos(math.pi * i / 5 + .1)) for i in range(10) for k in ((r if i % 2 == 0 else .45 * r),)]
    return f'<polygon points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in p)}" fill="#2f9e44"/>'
svg = f'''<svg xmlns="http://www.w3.org/2000/svg" width="384" height="384">
<rect width="384" height="384" fill="#e7f0f8"/>
{star(82, 84, 60)}
{icon(thing, 226, 24, 128)}
<rect x="24" y="212" width="210" height="140" rx="12" fill="#e03131"/>
{icon(other, 256, 232, 104)}
</svg>'''
image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGB")
draw = ImageDraw.Draw(image)
draw.text((129, 282), "PULL", font=ImageFont.truetype(font, 78), fill="white", anchor="mm")
image.save(output, optimize=True)
