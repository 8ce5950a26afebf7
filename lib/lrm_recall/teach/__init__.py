"""The mathematics behind the walkthroughs: small, exact, on tensors that fit a page. Nothing here draws."""
