//! The store's promises on memory, on a local folder, over S3, and through the counting wrapper.

mod memory {
    use updraft_store::Store;

    updraft_store::conformance_tests!(async { Some(Store::memory()) });
}

mod folder {
    updraft_store::conformance_tests!(async { Some(crate::folder_store()) });
}

mod counted {
    use updraft_store::{Store, faults};

    updraft_store::conformance_tests!(async { Some(faults::count(&Store::memory()).0) });
}

/// A server in this process that checks signatures, pages listings and honours preconditions.
mod s3 {
    use updraft_store::Store;
    use updraft_store::conformance::s3::S3Server;

    async fn served() -> Option<Store> {
        let server = S3Server::start().await;
        let store = server.store("some/prefix");
        std::mem::forget(server); // It lives as long as the test's runtime.
        Some(store)
    }

    updraft_store::conformance_tests!(served());
}

/// Set `UPDRAFT_TEST_S3_ENDPOINT` to a server's address to run these, for example one started by
/// `python3 -m moto.server -p 5555`: `UPDRAFT_TEST_S3_ENDPOINT=http://127.0.0.1:5555`.
mod foreign_s3 {
    use crate::s3_store;

    updraft_store::conformance_tests!(s3_store("conformance"));
}
