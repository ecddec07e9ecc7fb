//! Opening `gs://` stores: Google Cloud Storage.

use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};

use crate::cloud::{Place, client, retry};
use crate::patience::Patience;
use crate::{Result, Store};

pub(crate) fn open(
    url: &str,
    rest: &str,
    env: impl IntoIterator<Item = (String, String)>,
) -> Result<Store> {
    let place = Place::parse(url, rest, "GOOGLE_APPLICATION_CREDENTIALS")?;
    crate::tls::install();
    let mut builder = GoogleCloudStorageBuilder::new();
    for (key, value) in env {
        let setting = key.to_ascii_lowercase().parse::<GoogleConfigKey>();
        match setting {
            Ok(setting)
                if key.starts_with("GOOGLE_")
                    && !value.is_empty()
                    && !matches!(
                        setting,
                        GoogleConfigKey::Client(_) | GoogleConfigKey::Bucket
                    ) =>
            {
                builder = builder.with_config(setting, value);
            }
            _ => {}
        }
    }
    let built = builder
        .with_bucket_name(place.bucket)
        .with_client_options(client(false))
        .with_http_connector(Patience::default())
        .with_retry(retry())
        .build();
    place.open(
        built,
        "GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT",
    )
}
