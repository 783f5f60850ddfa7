//! Leases: what containerd's collector must not take while somebody works with it.

use std::collections::HashMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{Containerd, ContainerdError, found, header};
use crate::oci::Digest;
use crate::proto::containerd::services::leases::v1 as proto;
use crate::proto::containerd::services::leases::v1::leases_client::LeasesClient;

/// The label with the time at which the collector takes a lease or an image, RFC 3339.
const LABEL_EXPIRE: &str = "containerd.io/gc.expire";

impl Containerd {
    /// Makes a lease that ends by itself after `lifetime`, should nobody delete it. A lease of that name that is there already
    /// stays as it is.
    pub async fn create_lease(&self, id: &str, lifetime: Duration) -> Result<(), ContainerdError> {
        header(id)?;
        let labels = HashMap::from([expires_in(lifetime)]);
        let request = proto::CreateRequest { id: id.to_owned(), labels };
        match self.leases_client().create(self.call(request)).await {
            Ok(_) => Ok(()),
            Err(status) if status.code() == tonic::Code::AlreadyExists => Ok(()),
            Err(status) => Err(status.into()),
        }
    }

    /// Keeps a blob for as long as the lease lives.
    pub async fn lease_blob(&self, lease: &str, digest: &Digest) -> Result<(), ContainerdError> {
        let resource = proto::Resource { id: digest.as_str().to_owned(), r#type: "content".to_owned() };
        let request = proto::AddResourceRequest { id: lease.to_owned(), resource: Some(resource) };
        self.leases_client().add_resource(self.call(request)).await?;
        Ok(())
    }

    /// Ends a lease; succeeds when there is none. What it kept is collected when containerd collects next.
    pub async fn delete_lease(&self, id: &str) -> Result<(), ContainerdError> {
        let request = proto::DeleteRequest { id: id.to_owned(), sync: false };
        found(self.leases_client().delete(self.call(request)).await)?;
        Ok(())
    }

    /// The same namespace, every call under this lease: what a call makes or reads then belongs to it.
    pub fn under_lease(&self, id: &str) -> Result<Containerd, ContainerdError> {
        Ok(Containerd { lease: Some(header(id)?), ..self.clone() })
    }

    fn leases_client(&self) -> LeasesClient<tonic::transport::Channel> {
        LeasesClient::new(self.channel.clone())
    }
}

/// A label with which something ends by itself.
pub fn expires_in(lifetime: Duration) -> (String, String) {
    (LABEL_EXPIRE.to_owned(), rfc3339(SystemTime::now() + lifetime))
}

/// `2026-01-31T23:59:59Z`. Source: RFC 3339; the days of the civil calendar as counted from 1 March of year 0.
fn rfc3339(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (day, second) = (seconds / 86_400, seconds % 86_400);
    // Days since 0000-03-01: leap days are then the last of their four, hundred and four hundred years.
    let day = day + 719_468;
    let (era, day) = (day / 146_097, day % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (year, month) = (era * 400 + year + month / 10, (month + 2) % 12 + 1);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", second / 3_600, second / 60 % 60, second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_date() {
        // date -u -d @N +%FT%TZ
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (1_735_689_600, "2025-01-01T00:00:00Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }
}
