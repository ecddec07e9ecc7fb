//! The one TLS provider: rustls with ring.

/// Makes ring the process's provider unless the application has chosen one already.
///
/// reqwest without a built-in provider asks rustls for the process's default when a
/// client is built, and fails if there is none.
pub(crate) fn install() {
    if rustls::crypto::CryptoProvider::get_default().is_none() {
        // Losing a race means that somebody else has just installed one: as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
    }
}
