//! A plan: one reading of everything, and what would go by it.

use std::pin::pin;

use futures::TryStreamExt;

use super::mark::Sweep;
use super::roots::Roots;
use super::{CollectError, Collector, Damage, KindReport, Plan, Report, Step, Verdict, Watch};
use crate::content::ContentError;
use crate::content::inventory::Entry;
use crate::object::layout::Kind;

/// Only counts.
struct Count<'a>(&'a mut KindReport);

impl Sweep for Count<'_> {
    async fn part(&mut self, part: Vec<(Entry, Verdict)>, foreign: u64) -> Result<(), ContentError> {
        self.0.foreign += foreign;
        part.iter().for_each(|(entry, verdict)| self.0.count(entry, *verdict));
        Ok(())
    }

    fn goes_on(&self) -> bool {
        true
    }
}

impl Collector {
    /// Reads everything and says what would go; writes nothing.
    pub async fn plan(&self, watch: Watch<'_>) -> Result<Plan, CollectError> {
        let now = self.inventory.objects().now();
        let roots = self.read_roots(now, None, watch).await?;
        let mut report = Report {
            kinds: Kind::ALL.into_iter().map(KindReport::new).collect(),
            images: roots.images.len(),
            removed: roots.removed.clone(),
            damage: roots.damage.clone(),
            rounds: 0,
        };
        for known in &roots.reports {
            report.kind_mut(known.kind).clone_from(known);
        }
        for kind in [Kind::Trace, Kind::Use, Kind::Document] {
            let mut parts = pin!(self.inventory.parts(kind));
            let mut done = 0;
            while let Some(part) = parts.try_next().await? {
                done += 1;
                watch(Step { doing: "listing traces, uses and documents", done, total: 256 });
                let found = report.kind_mut(kind);
                found.foreign += part.foreign;
                for entry in part.entries {
                    found.count(&entry, of_hint(&entry, &[&roots], self.young_from(now)));
                }
            }
        }
        let young_from = self.young_from(now);
        let indexes = self.indexes(&[&roots], young_from, watch).await?;
        report.kind_mut(Kind::Index).clone_from(&indexes.report.expect("made above"));
        let mut chunks = KindReport::new(Kind::Chunk);
        let mut count = Count(&mut chunks);
        let swept = self.sweep(&[&roots], &indexes.needing, young_from, &mut count, None, watch).await;
        let (damage, rounds) = swept?;
        *report.kind_mut(Kind::Chunk) = chunks;
        report.damage.extend(damage);
        report.damage.sort_by(|a, b| a.name.cmp(&b.name));
        report.rounds = rounds;
        Ok(Plan { roots, report })
    }

    /// Whether what a plan found may be executed at all.
    pub fn check(&self, plan: &Plan) -> Result<(), CollectError> {
        self.refuse(&plan.report.damage, None)?;
        let refs = &plan.roots.reports[1];
        let refs = refs.needed.objects + refs.dead.objects + refs.young.objects;
        // Rules that remove the last image are not in question: they were written for this.
        if plan.roots.images.is_empty() && plan.roots.removed.is_empty() && refs > 0 && !self.rules.no_names {
            return Err(CollectError::NoNames { refs });
        }
        Ok(())
    }
}

impl Collector {
    /// An error if something of this forbids to delete anything. Of what is to be ignored only that is which the plan `known` had found, too:
    /// the rest may be an answer that was damaged on its way, or be under repair.
    pub(super) fn refuse(&self, damage: &[Damage], known: Option<&Report>) -> Result<(), CollectError> {
        let newer = damage.iter().filter(|damage| damage.newer).count();
        let worst = damage.iter().find(|damage| damage.newer || newer == 0);
        let told = worst.map(|damage| (damage.name.clone(), damage.problem.clone()));
        match told {
            Some((name, problem)) if newer > 0 => Err(CollectError::Newer { count: newer, name, problem }),
            Some((name, problem)) if !self.rules.ignore_damage => {
                Err(CollectError::Damaged { count: damage.len(), name, problem })
            }
            _ => Ok(()),
        }?;
        let knew = |damage: &Damage| {
            known.is_none_or(|known| known.damage.iter().any(|known| known.name == damage.name))
        };
        match damage.iter().find(|damage| !knew(damage)) {
            Some(Damage { name, problem, .. }) => {
                Err(CollectError::DamagedSince { name: name.clone(), problem: problem.clone() })
            }
            None => Ok(()),
        }
    }
}

/// What becomes of a trace, a use or a document.
pub(super) fn of_hint(entry: &Entry, readings: &[&Roots], young_from: i64) -> Verdict {
    let hash = &entry.place.hash;
    let needed = readings.iter().any(|roots| match entry.kind {
        Kind::Trace => roots.chains.contains(hash) || roots.ref_chains.contains(hash),
        Kind::Use => roots.images.contains(hash),
        Kind::Document => roots.documents.contains(hash),
        Kind::Name | Kind::Ref | Kind::Index | Kind::Chunk => true,
    });
    match needed {
        true => Verdict::Needed,
        false if entry.modified >= young_from => Verdict::Young,
        false => Verdict::Dead,
    }
}
