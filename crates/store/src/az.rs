//! Opening `az://` stores: Azure Blob Storage, a container in the bucket's place.

use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};

use crate::cloud::{Place, client, is_loopback, retry};
use crate::patience::Patience;
use crate::{Result, Store};

pub(crate) fn open(
    url: &str,
    rest: &str,
    env: impl IntoIterator<Item = (String, String)>,
) -> Result<Store> {
    let place = Place::parse(
        url,
        rest,
        "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    )?;
    crate::tls::install();
    let (mut builder, mut allow_http) = (MicrosoftAzureBuilder::new(), false);
    for (key, value) in env {
        let setting = key.to_ascii_lowercase().parse::<AzureConfigKey>();
        match setting {
            Ok(setting)
                if key.starts_with("AZURE_")
                    && !value.is_empty()
                    && !matches!(
                        setting,
                        AzureConfigKey::Client(_) | AzureConfigKey::ContainerName
                    ) =>
            {
                allow_http |= matches!(setting, AzureConfigKey::Endpoint) && is_loopback(&value);
                builder = builder.with_config(setting, value);
            }
            _ => {}
        }
    }
    let built = builder
        .with_container_name(place.bucket)
        .with_client_options(client(allow_http))
        .with_http_connector(Patience::default())
        .with_retry(retry())
        .build();
    place.open(
        built,
        "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    )
}
