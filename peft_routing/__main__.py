"""`python -m peft_routing`, for `accelerate launch -m peft_routing`."""

from peft_routing.cli import main

main()
