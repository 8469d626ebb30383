"""A process that compiles grammars to see whether it can, started as a script by `enforcement`.

No limit of llguidance's bounds what an intersection of patterns costs: 1.5 kB of schema compute for minutes and take
gigabytes. Here such a grammar ends this process and nothing else. So it imports none of our packages.

Lines of JSON: first the tokenizer, which is answered with the ids of the special tokens among `added`; then one grammar
a line, each answered with why it can't be compiled or begun, or an empty text.
"""

import json
import resource
import signal
import sys

CPU_SECONDS = 2
MEMORY_BYTES = 4 * 2**30


def main() -> None:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    given = json.loads(sys.stdin.readline())
    vocabulary = LLTokenizer(given["tokenizer"], n_vocab=given["vocab_size"])
    special = [token for token in given["added"] if vocabulary.is_special_token(token)]
    print(json.dumps(special), flush=True)
    limits = LLParserLimits(verbose_errors=False)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        # The signal's default action ends the process, whatever it is computing.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        grammar = json.loads(line)
        message = LLMatcher.validate_grammar(grammar, vocabulary, limits=limits)
        if not message:  # some faults show only where the first token is to be drawn
            matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
            begins = any(matcher.compute_bitmask())
            message = "" if begins and not matcher.is_error() else f"no text can begin: {matcher.get_error()}"
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(message), flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main()
