//! From any conversations to committed Parquet shards and back, larger than memory.
