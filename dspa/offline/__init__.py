"""From preference triples to activation densities, in resumable shards."""
