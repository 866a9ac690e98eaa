"""Everything one would use instead of lora_kernels for one linear layer, each at its best documented setting.

`base` says what a rival is, `registry` lists them by name; the other files have one kind each.
"""
