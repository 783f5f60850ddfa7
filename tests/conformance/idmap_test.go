package conformance

import (
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
)

const parentChainID = "containerd.io/snapshot/parent-chain-id"

var chainID = "sha256:" + strings.Repeat("c4", 32)

// TestIDMapping mounts for a user namespace, as containerd's client does when
// the plugin has the capability remap-ids.
func TestIDMapping(t *testing.T) {
	needRoot(t)
	t.Parallel()
	s := serve(t)
	s.layer(t, "one", "", func(dir string) {
		write(t, dir+"/root", "1")
		write(t, dir+"/user", "2")
		must(t, os.Chown(dir+"/user", 1000, 1000))
	})
	s.layer(t, "two", "one", func(dir string) { write(t, dir+"/second", "3") })

	for _, parent := range []string{"one", "two"} {
		m, err := s.prepare("active on "+parent, parent, mapped)
		must(t, err)
		mounted(t, m, func(dir string) {
			wantOwner(t, dir, 100000, 200000, 0o755)
			wantOwner(t, dir+"/root", 100000, 200000, 0o644)
			wantOwner(t, dir+"/user", 101000, 201000, 0o644)
			must(t, os.Chmod(dir+"/user", 0o600)) // copies it up
			wantOwner(t, dir+"/user", 101000, 201000, 0o600)
			wantFile(t, dir+"/user", "2")
		})
	}
	// The image itself keeps its owners.
	m, err := s.view("look", "two", nil)
	must(t, err)
	mounted(t, m, func(dir string) {
		wantOwner(t, dir+"/root", 0, 0, 0o644)
		wantOwner(t, dir+"/user", 1000, 1000, 0o644)
	})
}

// TestBadIDMapping sends mappings that are none. They end up in mount options,
// so whatever is not exactly a mapping must be refused.
func TestBadIDMapping(t *testing.T) {
	needRoot(t)
	t.Parallel()
	s := serve(t)
	s.layer(t, "one", "", nil)
	good := "0:100000:65536"
	for _, bad := range []string{
		"0", "0:1000", "a:b:c", "0:1000:x", ":::", "::", "0:1000:", ",", good + ",", "," + good,
		"0:1000:65536,x",
		"-1:0:1", "0:-1:1", "0:0:-1",
		"0:4294967295:1", "0:4294967296:1", "4294967296:0:1", "0:0:99999999999999999999999",
		"0:1000:0",     // maps nothing
		"1:1000:65536", // leaves out root
		"0:1000:10,ro", "0:1000:10 ro", "0:1000:10\n", "0:1000:10,upperdir=/etc", "0:1000:10:20",
		strings.Repeat("1:1:1,", 5000) + "1:1:1",
	} {
		for _, labels := range []map[string]string{
			{snapshots.LabelSnapshotUIDMapping: bad, snapshots.LabelSnapshotGIDMapping: good},
			{snapshots.LabelSnapshotUIDMapping: good, snapshots.LabelSnapshotGIDMapping: bad},
		} {
			for _, parent := range []string{"", "one"} {
				_, err := s.prepare("new", parent, labels)
				wantCode(t, "Prepare with mapping "+bad[:min(len(bad), 40)], err, codes.InvalidArgument)
				_, err = s.stat("new")
				wantCode(t, "Stat after a refused Prepare", err, codes.NotFound)
				if err == nil {
					must(t, s.remove("new"))
				}
			}
		}
	}
	s.wantNames(t, "one")
	// Several ranges are a mapping.
	m, err := s.prepare("ranges", "one", map[string]string{
		snapshots.LabelSnapshotUIDMapping: "1:5000:10,0:7000:1",
		snapshots.LabelSnapshotGIDMapping: "0:8000:1,1:9000:10",
	})
	must(t, err)
	wantOwner(t, upper(t, m), 7000, 8000, 0o755)
	if !slices.Contains(m[0].Options, "uidmap=1:5000:10,0:7000:1") || !slices.Contains(m[0].Options, "gidmap=0:8000:1,1:9000:10") {
		t.Errorf("mappings of several ranges: %v", m)
	}
	s.wantConsistent(t)
}

// TestExtractionIDMapping: on a layer that is being unpacked, mappings can only
// have come from the image's manifest. They must do nothing, not even harm.
func TestExtractionIDMapping(t *testing.T) {
	needRoot(t)
	t.Parallel()
	s := serve(t)
	s.layer(t, "one", "", nil)
	for i, value := range []string{"0:100000:65536", "nonsense"} {
		for _, parent := range []string{"", "one"} {
			key := "extract " + parent + value
			m, err := s.prepare(key, parent, map[string]string{
				snapshots.LabelSnapshotRef:        chainID,
				snapshots.LabelSnapshotUIDMapping: value,
				snapshots.LabelSnapshotGIDMapping: value,
			})
			if err != nil {
				t.Errorf("extraction with mapping %q: %v", value, err)
				continue
			}
			wantOwner(t, upper(t, m), 0, 0, 0o755)
			if o := m[0].Options; slices.ContainsFunc(o, func(o string) bool {
				return strings.HasPrefix(o, "uidmap=") || strings.HasPrefix(o, "gidmap=")
			}) {
				t.Errorf("case %d: the layer would be unpacked through a mapping: %v", i, o)
			}
			again, err := s.mounts(key)
			must(t, err)
			wantMounts(t, "Mounts of an extraction", again, m)
		}
	}
}

// TestParallelExtraction: in containerd's parallel mode every layer is prepared
// without its parent, and only an overlay mount makes the applier keep whiteouts.
func TestParallelExtraction(t *testing.T) {
	needRoot(t)
	t.Parallel()
	s := serve(t)
	s.layer(t, "one", "", func(dir string) { write(t, dir+"/gone", "1") })
	labels := map[string]string{
		snapshots.LabelSnapshotRef:    chainID,
		snapshots.LabelSnapshotDiffID: chainID,
		parentChainID:                 "sha256:" + strings.Repeat("a1", 32),
	}
	const key = "extract-1-abcd sha256:c4"
	m, err := s.prepare(key, "", labels)
	must(t, err)
	if len(m) != 1 || m[0].Type != "overlay" || m[0].Target != "" {
		t.Fatalf("want one overlay, got %v", m)
	}
	for _, o := range m[0].Options {
		if strings.HasPrefix(o, "lowerdir") {
			t.Errorf("there is no lower directory yet: %v", m)
		}
	}
	if m[0].ReadOnly() {
		t.Errorf("containerd would take %v for a staged layer", m)
	}
	wantOwner(t, upper(t, m), 0, 0, 0o755)
	again, err := s.mounts(key)
	must(t, err)
	wantMounts(t, "Mounts of a parentless extraction", again, m)
	s.restart(t, killed)
	again, err = s.mounts(key)
	must(t, err)
	wantMounts(t, "the same after a crash", again, m)

	must(t, unix.Mknod(upper(t, m)+"/gone", unix.S_IFCHR, 0))
	write(t, upper(t, m)+"/here", "2")
	must(t, s.commit("two", key, "one", labels))
	v, err := s.view("look", "two", nil)
	must(t, err)
	mounted(t, v, func(dir string) {
		if _, err := os.Lstat(dir + "/gone"); !os.IsNotExist(err) {
			t.Errorf("the whiteout did nothing: %v", err)
		}
		wantFile(t, dir+"/here", "2")
	})

	// The bottom layer is never told a parent; on a container's snapshot the label
	// means nothing.
	bottom := maps.Clone(labels)
	delete(bottom, parentChainID)
	for what, labels := range map[string]map[string]string{
		"bottom layer": bottom, "container": {parentChainID: labels[parentChainID]},
	} {
		m, err := s.prepare(what, "", labels)
		must(t, err)
		if m[0].Type != "bind" || !slices.Equal(m[0].Options, []string{"rw", "rbind"}) {
			t.Errorf("%s: %v", what, m)
		}
	}
	// With its parent a layer is prepared as ever.
	m, err = s.prepare("sequential", "one", labels)
	must(t, err)
	if !slices.ContainsFunc(m[0].Options, func(o string) bool { return strings.HasPrefix(o, "lowerdir=") }) {
		t.Errorf("sequential: %v", m)
	}
}
