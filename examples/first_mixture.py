"""Make a mixture of experts of a base model and two fine-tunes of it, train its gates, and let it
write. The directories base/, math/ and code/ and texts in math.jsonl and code.jsonl lie here.
"""

from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from transformers import AutoModelForCausalLM, AutoTokenizer

import mergekit_moe_ext

config = {
    "merge_method": "moe_ties",
    "base_model": "./base",
    "models": [{"model": "./base"}, {"model": "./math"}, {"model": "./code"}],
    "parameters": {"experts_per_token": 2},
}
run_merge(MergeConfiguration.model_validate(config), "mixture", MergeOptions())
mergekit_moe_ext.train("mixture", ["math=math.jsonl", "code=code.jsonl"], ["gates"])

model = AutoModelForCausalLM.from_pretrained("mixture-trained")
tokenizer = AutoTokenizer.from_pretrained("mixture-trained")
inputs = tokenizer("The sum of two and", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
