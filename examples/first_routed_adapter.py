"""Put two LoRA adapters and a router on one base model, let it write, and save it as one adapter.
The directories base/, math-lora/ and code-lora/ lie here.
"""

from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_routing import RoutedLoraConfig

adapters = {"math": "math-lora/", "code": "code-lora/"}
config = RoutedLoraConfig(experts=adapters, router="arrow", top_k=1)
model = get_peft_model(AutoModelForCausalLM.from_pretrained("base"), config)
model.save_pretrained("routed/")

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "routed/")
tokenizer = AutoTokenizer.from_pretrained("base")
inputs = tokenizer("The sum of two and", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
