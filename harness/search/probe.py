"""python harness/search/probe.py ADDRESS: whether a Ray cluster that this process could join answers there.

Prints one line of JSON: null if it does, else why not. ray.init would try for minutes, in C++ where no signal is
handled; this process can be killed, and its environment has short limits (`_why_not` in harness/search/cluster.py).
"""

import json
import sys


def main(address: str) -> None:
    answer: str | None = None
    try:
        answer = _found(address)
    except BaseException as error:
        answer = " ".join(str(error).split())[:120] or type(error).__name__
        if "Timed out" in answer:
            answer = "no Ray cluster answers there"
    print(json.dumps(answer))


def _found(address: str) -> str | None:
    from ray._private import services
    from ray._private.authentication import authentication_token_setup as tokens
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    if address == "auto" and hasattr(tokens, "maybe_enable_token_auth_if_token_available"):  # as ray.init of 2.60
        tokens.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    tokens.ensure_token_if_auth_enabled({}, create_token_if_missing=False)
    found = services.canonicalize_bootstrap_address(address)
    if found is None:
        return "no Ray cluster runs on this machine"
    nodes = GcsClient(address=found).get_all_node_info(timeout=4)
    if not {node.hex() for node in nodes} & set(services.find_node_ids()):
        return "no node of that cluster runs on this machine; start one with `ray start --address=HOST:PORT`"
    return None


if __name__ == "__main__":
    main(sys.argv[1])
