"""What a user states, checked together: hardware, model, plan and workload; nothing that is derived from them."""
