//! What the store promises, on every backend and through every wrapper.

mod backends;
mod errors;
mod folder;
mod hub;
mod kill;
mod s3;

use folder::folder_store;
use s3::s3_store;
