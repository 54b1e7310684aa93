"""From one GGUF file to a smaller one: reads it, plans types, rounds (quant/) and writes."""
