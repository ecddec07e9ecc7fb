//! What the store promises, on every backend and through every wrapper.

mod backends;
mod errors;
mod folder;
mod hub;
mod hub_cache;
mod hub_server;
mod kill;
mod push;
mod s3;
mod wire;

use folder::folder_store;
use s3::s3_store;
