"""fill_readme.py CHECKOUT: metadata and summary of README.md from examples/tiny/evaluation.json; answers of the widget from the model."""
import json, sys
from pathlib import Path
R=Path(sys.argv[1]); sys.path.insert(0,str(R/'examples/tiny'))
from huggingface_hub import ModelCard
from score import Counts, as_summary
from flashsloth.cli.model_card import read_results
ev=R/'examples/tiny/evaluation.json'
result={s:{k:Counts(**c) for k,c in kinds.items()} for s,kinds in json.loads(ev.read_text()).items()}
card=ModelCard((R/'README.md').read_text(), ignore_metadata_errors=False)
card.data.eval_results=read_results(ev)
widgets=json.loads(Path(sys.argv[2]).read_text())  # [{"text","src","output":{"text"}}]
card.data.widget=widgets
text=str(card)
text=text.replace('@@ as_summary', as_summary(result))
(R/'README.md').write_text(text)
