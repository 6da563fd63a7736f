"""How fast the exported winner answers in every runtime, and checks that this project itself does not get slower."""
