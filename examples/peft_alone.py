"""Use a saved memory without Absorber: peft_alone.py MODEL_FOLDER MEMORY_FOLDER PROMPT"""

import sys

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

source, memory, prompt = sys.argv[1:4]
tokenizer = AutoTokenizer.from_pretrained(source)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), memory)
inputs = tokenizer(prompt, return_tensors="pt")
written = model.generate(**inputs, max_new_tokens=20, do_sample=False)
print(tokenizer.decode(written[0], skip_special_tokens=True))
