"""The bench: operators against their peers and against the machine's measured limits. Not installed with the package.

    python -m bench decode          # time one suite; writes bench/results/*.json. --quick for a look
    python -m bench all             # every suite
    python -m bench limits          # measure and print the machine's limits
    python -m bench table           # write the tables of README.md and docs/bench.md from bench/results/
    python -m bench plots           # draw bench/pictures/, and those of them in docs/bench/, from bench/results/
    python -m bench compare OLD NEW # what became slower, beyond noise, between two results

`timing` measures, `limits` says what the machine can do, `runner` puts them together and checks every timed result,
`report`, `plots` and `compare` read results. A suite (`suites`) turns cases into problems to time, with the `peers`
that can run them; `paged` and `dense` hold the tensors of attention over a paged cache and over keys beside queries.
"""
