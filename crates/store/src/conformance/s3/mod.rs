//! An S3 server on the loopback, in this process: objects in memory, signatures checked.
//!
//! It speaks what object stores over S3 rest on: signed requests (SigV4), conditional writes and
//! reads, ranges, paged listings, multipart uploads, bulk deletes; and it can [fail at the
//! wire](S3Server::fail_at).

mod http;
mod objects;
mod server;
mod signature;

pub use server::{S3Server, WireFault};
