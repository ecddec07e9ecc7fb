//! AWS Signature Version 4, recomputed and compared.
//!
//! Source: <https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html>

use sha2::{Digest, Sha256};

use super::http::{Request, encode};
use crate::stage_key::{hex, sha256_hex};

/// Whether a request was signed with this secret, and its body is the one that was signed.
pub(super) fn is_valid(request: &Request, key_id: &str, secret: &str) -> bool {
    check(request, key_id, secret).unwrap_or(false)
}

fn check(request: &Request, key_id: &str, secret: &str) -> Option<bool> {
    let given = request
        .header("authorization")?
        .strip_prefix("AWS4-HMAC-SHA256 ")?;
    let part = |name: &str| {
        let mut parts = given.split(',').map(str::trim);
        parts.find_map(|part| part.strip_prefix(name)?.strip_prefix('='))
    };
    let (id, scope) = part("Credential")?.split_once('/')?;
    let content = request.header("x-amz-content-sha256")?;
    let body_is_signed = content == "UNSIGNED-PAYLOAD" || content == sha256_hex(&request.body);
    let expected = sign(request, part("SignedHeaders")?, content, scope, secret)?;
    Some(id == key_id && body_is_signed && part("Signature")? == expected)
}

fn sign(
    request: &Request,
    signed: &str,
    content: &str,
    scope: &str,
    secret: &str,
) -> Option<String> {
    let mut headers = String::new();
    for name in signed.split(';') {
        headers += &format!("{name}:{}\n", request.header(name)?);
    }
    let query: Vec<String> = request
        .query
        .iter()
        .map(|(key, value)| format!("{}={}", encode(key), encode(value)))
        .collect();
    let canonical = [
        &request.method,
        &request.path,
        &query.join("&"),
        &headers,
        signed,
        content,
    ]
    .join("\n");
    let to_sign = format!(
        "AWS4-HMAC-SHA256\n{}\n{scope}\n{}",
        request.header("x-amz-date")?,
        sha256_hex(canonical.as_bytes())
    );
    let start = format!("AWS4{secret}").into_bytes();
    let key = scope
        .split('/')
        .fold(start, |key, part| hmac(&key, part.as_bytes()));
    Some(hex(&hmac(&key, to_sign.as_bytes())))
}

/// HMAC-SHA256 (RFC 2104).
fn hmac(key: &[u8], message: &[u8]) -> Vec<u8> {
    const BLOCK: usize = 64;
    let mut block = if key.len() > BLOCK {
        Sha256::digest(key).to_vec()
    } else {
        key.to_vec()
    };
    block.resize(BLOCK, 0);
    let pad = |byte: u8| -> Vec<u8> { block.iter().map(|key| key ^ byte).collect() };
    let inner = Sha256::new_with_prefix(pad(0x36))
        .chain_update(message)
        .finalize();
    Sha256::new_with_prefix(pad(0x5c))
        .chain_update(inner)
        .finalize()
        .to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hmac_is_rfc_4231s() {
        let found = hmac(b"Jefe", b"what do ya want for nothing?");
        assert_eq!(
            hex(&found),
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
        );
    }

    /// The GET example of AWS's page.
    #[test]
    fn the_published_example_is_accepted_and_any_change_is_not() {
        let empty = sha256_hex(b"");
        let request = |path: &str, secret: &str| {
            let headers = [
                ("host", "examplebucket.s3.amazonaws.com"),
                ("range", "bytes=0-9"),
                ("x-amz-content-sha256", &empty),
                ("x-amz-date", "20130524T000000Z"),
                (
                    "authorization",
                    "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request,SignedHeaders=host;range;x-amz-content-sha256;x-amz-date,Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41",
                ),
            ];
            let request = Request {
                method: "GET".to_owned(),
                path: path.to_owned(),
                query: Default::default(),
                headers: headers
                    .map(|(name, value)| (name.to_owned(), value.to_owned()))
                    .into(),
                body: Default::default(),
            };
            is_valid(&request, "AKIAIOSFODNN7EXAMPLE", secret)
        };
        let secret = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY";
        assert!(request("/test.txt", secret));
        assert!(!request("/test2.txt", secret));
        assert!(!request("/test.txt", "other"));
    }
}
