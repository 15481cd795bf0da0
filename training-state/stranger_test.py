"""Ordinary drawings, made with PIL alone and questions in a stranger's words. stranger_test.py MODEL N [--hd]"""
import math, random, sys
from collections import Counter
import torch
from PIL import Image, ImageDraw, ImageFont
from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
RGB={"red":"#e02020","green":"#1f9d3a","blue":"#2050e0","yellow":"#f5d800","orange":"#ff8800","purple":"#8030b0","black":"#101010","pink":"#ff70b8","brown":"#7a4a20","white":"#ffffff","grey":"#808080"}
PAGES=[("white",(255,255,255)),("grey",(200,200,200)),("black",(20,20,24)),("yellow",(252,246,224)),("blue",(190,215,245))]
def poly(cx,cy,r,n,turn=-math.pi/2): return [(cx+r*math.cos(turn+2*math.pi*i/n),cy+r*math.sin(turn+2*math.pi*i/n)) for i in range(n)]
def paint(d,shape,cx,cy,r,c):
    if shape=="circle": d.ellipse((cx-r,cy-r,cx+r,cy+r),fill=c)
    elif shape=="square": d.rectangle((cx-r,cy-r,cx+r,cy+r),fill=c)
    elif shape=="triangle": d.polygon(poly(cx,cy,r*1.15,3),fill=c)
    elif shape=="star":
        p=[]
        for i in range(10):
            k=r*1.1 if i%2==0 else r*.45
            p.append((cx+k*math.sin(math.pi*i/5),cy-k*math.cos(math.pi*i/5)))
        d.polygon(p,fill=c)
    elif shape=="cross":
        d.rectangle((cx-r,cy-r*.3,cx+r,cy+r*.3),fill=c); d.rectangle((cx-r*.3,cy-r,cx+r*.3,cy+r),fill=c)
    else:
        d.pieslice((cx-r,cy-r*.9,cx,cy+r*.1),180,360,fill=c); d.pieslice((cx,cy-r*.9,cx+r,cy+r*.1),180,360,fill=c)
        d.polygon([(cx-r,cy-r*.4),(cx+r,cy-r*.4),(cx,cy+r)],fill=c)
SH=["circle","square","triangle","star","cross","heart"]
def scene(rng):
    w,h=rng.choice([(256,256),(400,300),(300,400),(640,360),(512,512),(240,480)])
    name,bg=rng.choice(PAGES); im=Image.new("RGB",(w,h),bg); d=ImageDraw.Draw(im)
    n=rng.choice([1,1,2,2,3,4]); places=[(x,y) for x in (.2,.5,.8) for y in (.2,.5,.8)]; rng.shuffle(places); out=[]
    for x,y in places[:n]:
        s=rng.choice(SH); c=rng.choice([c for c in RGB if c!=name and not(name=="grey" and c=="white") and not(name=="yellow" and c=="white")])
        if any((s,c)==(a,b) for a,b,_,_ in out): continue
        paint(d,s,x*w,y*h,min(w,h)*rng.uniform(.09,.14),RGB[c]); out.append((s,c,x,y))
    return im,out
def asks(rng,out):
    q=[]
    s,c,x,y=rng.choice(out); names=Counter(a for a,_,_,_ in out); cols=Counter(b for _,b,_,_ in out)
    if names[s]==1: q.append(("colour",f"What color is the {s}?",c))
    if cols[c]==1: q.append(("shape",f"What shape is {c}?",s))
    q.append(("count","How many shapes are there?",str(len(out))))
    q.append(("is there",f"Is there a {c} {s}?","yes"))
    m=rng.choice([z for z in SH if z not in names]); q.append(("absent",f"Is there a {m}?" if m[0] not in "aeiou" else f"Is there an {m}?","no"))
    place=f"{('top','','bottom')[int(y*3)]} {('left','','right')[int(x*3)]}".strip() or "middle"
    if names[s]==1: q.append(("where",f"Where is the {s}?",place))
    if len(out)>1:
        t,e,u,v=rng.choice([o for o in out if o!=(s,c,x,y)])
        if names[t]==names[s]==1 and abs(u-x)>.1: q.append(("left of",f"Is the {s} left or right of the {t}?","left" if x<u else "right"))
        if names[t]==names[s]==1 and abs(v-y)>.1: q.append(("above",f"Is the {s} above or below the {t}?","above" if y<v else "below"))
    if len(out)==1: q.append(("what",f"What is this?",f"{c} {s}"))
    q.append(("describe","Describe the image.",", ".join(f"a{'n' if b[0]=='o' else ''} {b} {a} {(('top','','bottom')[int(Y*3)]+' '+('left','','right')[int(X*3)]).strip() or 'middle'}" for a,b,X,Y in sorted(out,key=lambda o:(o[3],o[2])))))
    return q
def main():
    path,n=sys.argv[1],int(sys.argv[2]); hd="--hd" in sys.argv
    torch.set_num_threads(2)
    m=FlashSlothForConditionalGeneration.from_pretrained(path,dtype=torch.float32).eval(); p=FlashSlothProcessor.from_pretrained(path)
    rng=random.Random(7); asked,right=Counter(),Counter(); wrong=[]
    todo=[]
    for i in range(n):
        im,out=scene(rng)
        for k,q,a in asks(rng,out): todo.append((im,k,q,a))
    words=["HELLO","cat","Paris","EXIT","42","Moon","sale","2026","BIRD","Tea"]
    import matplotlib; from pathlib import Path
    f=Path(matplotlib.get_data_path())/"fonts/ttf"
    for i in range(n//2):
        w=rng.choice(words); im=Image.new("RGB",(320,240),"white"); font=ImageFont.truetype(str(f/rng.choice(["DejaVuSans.ttf","DejaVuSerif.ttf","DejaVuSans-Bold.ttf"])),60)
        ImageDraw.Draw(im).text((rng.randint(10,80),rng.randint(10,150)),w,font=font,fill="black"); todo.append((im,"read","Read the text.",w))
    for s in range(0,len(todo),32):
        b=todo[s:s+32]
        inp=p.encode_conversations([[{"role":"user","content":[{"type":"image","image":im},{"type":"text","text":q}]}] for im,_,q,_ in b],padding=True,do_image_splitting=hd)
        with torch.inference_mode(): o=m.generate(**inp,max_new_tokens=60,do_sample=False)
        for (im,k,q,a),t in zip(b,p.post_process_image_text_to_text(o[:,inp["input_ids"].shape[1]:])):
            asked[k]+=1; right[k]+=t==a
            if t!=a: wrong.append((k,q,a,t))
    for k in asked: print(k,right[k],asked[k],f"{right[k]/asked[k]:.0%}")
    print("all",sum(right.values()),sum(asked.values()),f"{sum(right.values())/sum(asked.values()):.1%}")
    for w in wrong[:40]: print(w)
main()
