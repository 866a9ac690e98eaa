"""Side-by-side benchmarks of lora_kernels and of everything one would use instead.

    python -m bench run SUITE... --device cpu|cuda --against all|names --json F --plot F.png
    python -m bench report | tune | profile OP SHAPE | compile-check --arch 80 90 100
    pytest bench --benchmark-only -k dequantize

The method, in the order in which the code does it:

1. Every contender of a line gets the same bytes: one random weight, quantized once, dequantized once for the dense ones.
2. Its output, and for training every gradient, is compared with float64.  Ours may err twice as much as plain torch in the
   same dtype, a rival eight times; who errs more is reported as wrong and not timed.
3. Contenders take turns in one process: a round times each once, and the next round goes the other way round.  What a
   neighbour or the clock does to one round it does to all of them, so the ratio is taken within a round; the table shows
   the median over rounds, the JSON file its quartiles too.
4. Weights are cold: each contender rotates through copies of its own weight that together exceed three times the last-level
   cache.  Where 128 copies (4 from 512 rows on, where x and y alone sweep the cache) do not exceed it, the line says "in
   cache"; the JSON file says how many there were.  On CUDA the L2 cache is flushed before every launch that is not in a
   graph, and events time it; a graph holds one call for each copy.
5. A copy and a library matrix product are measured in the same run.  "of ceiling" is the time that the bytes at copy speed,
   or the operations at matrix product speed, would take (the larger of the two), over the time taken.

A ratio is always the rival's time over ours: above 1 we are faster.
"""
