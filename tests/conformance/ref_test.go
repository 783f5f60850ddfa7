package conformance

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
)

var twoLayers = map[string]map[string]string{
	id("a"): {"etc/hello": "from a", "etc/both": "a"},
	id("b"): {"etc/world": "from b", "etc/both": "b"},
}

// pairs counts the committed snapshots of each (ref, parent), and fails on
// whatever else is listed.
func (s *server) pairs(t testing.TB) map[[2]string]int {
	t.Helper()
	infos, err := s.list()
	must(t, err)
	count := map[[2]string]int{}
	for _, i := range infos {
		if i.GetKind() != snapshotsapi.Kind_COMMITTED {
			t.Errorf("left behind: %v", i)
			continue
		}
		count[[2]string{i.GetLabels()[snapshots.LabelSnapshotRef], i.GetParent()}]++
	}
	return count
}

// only returns the name of the one committed snapshot of (ref, parent).
func (s *server) only(t testing.TB, ref, parent string) string {
	t.Helper()
	found := s.names(t, fmt.Sprintf(`labels.%q==%s,parent==%q`, snapshots.LabelSnapshotRef, ref, parent))
	if len(found) != 1 {
		t.Fatalf("(%.12s, %q) is there %d times: %q", ref, parent, len(found), found)
	}
	return found[0]
}

// TestWithRef plays containerd's part of the remote protocol: a layer that the
// store has is never unpacked, in any namespace, and is there only once.
func TestWithRef(t *testing.T) {
	needRoot(t)
	t.Parallel()
	s := serve(t, layers(t, twoLayers))
	m := newMetadataLayer(t, s.snapshotter())
	a, b, c := id("a"), id("b"), id("c")

	for _, n := range []string{"one", "two"} {
		_, err := m.sn.Prepare(ns(n), "extract a", "", refer(a))
		wantExists(t, "first layer in "+n, err)
		_, err = m.sn.Prepare(ns(n), "extract b", a, refer(b))
		wantExists(t, "second layer in "+n, err)
		for ref, parent := range map[string]string{a: "", b: a} {
			info, err := m.sn.Stat(ns(n), ref)
			must(t, err)
			if info.Parent != parent || info.Kind != snapshots.KindCommitted || info.Name != ref {
				t.Errorf("%s in %s: %+v", ref[:9], n, info)
			}
		}
		for _, key := range []string{"extract a", "extract b"} {
			if _, err := m.sn.Stat(ns(n), key); !errdefs.IsNotFound(err) {
				t.Errorf("key %q is left in %s: %v", key, n, err)
			}
		}
		// Asked again, containerd answers by itself; with another parent too.
		_, err = m.sn.Prepare(ns(n), "extract again", "", refer(b))
		wantExists(t, "the same again in "+n, err)
	}
	backendA := s.only(t, a, "")
	backendB := s.only(t, b, backendA)
	s.wantNames(t, backendA, backendB)

	// What was found is a layer like any other.
	for _, n := range []string{"one", "two"} {
		mounts, err := m.sn.Prepare(ns(n), "container", b)
		must(t, err)
		mounted(t, mounts, func(dir string) {
			wantFile(t, dir+"/etc/hello", "from a")
			wantFile(t, dir+"/etc/world", "from b")
			wantFile(t, dir+"/etc/both", "b")
			write(t, dir+"/etc/hello", "changed in "+n)
		})
		again, err := m.sn.Mounts(ns(n), "container")
		must(t, err)
		wantMounts(t, "Mounts on top of a found layer", again, mounts)
		must(t, m.sn.Commit(ns(n), "image of "+n, "container"))
		mounts, err = m.sn.View(ns(n), "look", "image of "+n)
		must(t, err)
		mounted(t, mounts, func(dir string) { wantFile(t, dir+"/etc/hello", "changed in "+n) })
		mounts, err = m.sn.View(ns(n), "look below", a)
		must(t, err)
		mounted(t, mounts, func(dir string) { wantFile(t, dir+"/etc/hello", "from a") })
		for _, key := range []string{"look", "look below", "image of " + n} {
			must(t, m.sn.Remove(ns(n), key))
		}
	}

	// A third namespace with other ancestors: uniqueness is by (ref, parent).
	_, err := m.sn.Prepare(ns("three"), "extract c", "", refer(c))
	must(t, err) // the store does not have it: an ordinary extraction
	must(t, m.sn.Commit(ns("three"), c, "extract c", refer(c)))
	_, err = m.sn.Prepare(ns("three"), "extract b", c, refer(b))
	wantExists(t, "the layer on another parent", err)
	info, err := m.sn.Stat(ns("three"), b)
	must(t, err)
	if info.Parent != c {
		t.Errorf("on another parent: %+v", info)
	}
	if other := s.only(t, b, s.only(t, c, "")); other == backendB {
		t.Error("one snapshot for two parents")
	}
	mounts, err := m.sn.View(ns("three"), "look", b)
	must(t, err)
	mounted(t, mounts, func(dir string) { wantFile(t, dir+"/etc/both", "b") })

	// And one that asks for the second layer with no parent at all.
	_, err = m.sn.Prepare(ns("four"), "extract b", "", refer(b))
	wantExists(t, "the layer without a parent", err)
	s.only(t, b, "")
	if info, err = m.sn.Stat(ns("four"), b); err != nil || info.Parent != "" {
		t.Errorf("without a parent: %+v %v", info, err)
	}
	// A parent that this namespace does not have stays unknown.
	if _, err = m.sn.Prepare(ns("five"), "extract b", a, refer(b)); !errdefs.IsNotFound(err) {
		t.Errorf("a parent of other namespaces: %v", err)
	}
	// Isolated, one namespace does not see what another unpacked.
	_, err = m.sn.Prepare(ns("five"), "extract c", "", refer(c))
	must(t, err)

	s.restart(t, killed)
	m = newMetadataLayer(t, s.snapshotter()) // knows nothing: all is garbage now
	if got := s.only(t, b, s.only(t, a, "")); got != backendB {
		t.Errorf("after a crash: %q, was %q", got, backendB)
	}
	_, err = m.sn.Prepare(ns("one"), "extract a", "", refer(a))
	wantExists(t, "a layer that lost its references", err)
	if got := s.only(t, a, ""); got != backendA {
		t.Errorf("found %q, was %q", got, backendA)
	}
	m.collect(t)
	s.wantNames(t)

	// Used again after everything was collected.
	for range 2 {
		_, err = m.sn.Prepare(ns("one"), "extract a", "", refer(a))
		wantExists(t, "first layer, again", err)
		_, err = m.sn.Prepare(ns("one"), "extract b", a, refer(b))
		wantExists(t, "second layer, again", err)
		mounts, err := m.sn.View(ns("one"), "look", b)
		must(t, err)
		mounted(t, mounts, func(dir string) { wantFile(t, dir+"/etc/hello", "from a") })
		s.only(t, b, s.only(t, a, ""))
		m.collect(t)
		s.wantNames(t)
	}
	s.wantConsistent(t)
}

// TestWithRefShared is what containerd's model snapshotter does, reached with
// layers.share = "node": any committed snapshot of (ref, parent) is a hit.
func TestWithRefShared(t *testing.T) {
	needRoot(t)
	t.Parallel()
	s := serve(t, withEnv("SPEEDY_LAYERS_SHARE=node"))
	m := newMetadataLayer(t, s.snapshotter())
	a, b := id("a"), id("b")

	unpack := func(n, key, parent, ref string) {
		t.Helper()
		mounts, err := m.sn.Prepare(ns(n), key, parent, refer(ref))
		must(t, err)
		mounted(t, mounts, func(dir string) { write(t, dir+"/from", ref) })
	}
	unpack("one", "extract a", "", a)
	_, err := m.sn.Prepare(ns("two"), "extract a early", "", refer(a))
	must(t, err) // an active one is no hit
	must(t, m.sn.Commit(ns("one"), a, "extract a", refer(a)))
	must(t, m.sn.Remove(ns("two"), "extract a early"))

	_, err = m.sn.Prepare(ns("two"), "extract a", "", refer(a))
	wantExists(t, "what another namespace unpacked", err)
	info, err := m.sn.Stat(ns("two"), a)
	must(t, err)
	if info.Parent != "" {
		t.Errorf("adopted: %+v", info)
	}

	// Both unpack the second layer at once; both commits are good.
	unpack("one", "extract b", a, b)
	unpack("two", "extract b", a, b)
	must(t, m.sn.Commit(ns("two"), b, "extract b", refer(b)))
	must(t, m.sn.Commit(ns("one"), b, "extract b", refer(b)))

	// A third one, with the wrong parent first: no hit, an ordinary extraction.
	mounts, err := m.sn.Prepare(ns("three"), "extract b", "", refer(b))
	must(t, err)
	mounted(t, mounts, func(dir string) { write(t, dir+"/wrong", "parent") })
	must(t, m.sn.Remove(ns("three"), "extract b"))
	if _, err = m.sn.Prepare(ns("three"), "extract b", a, refer(b)); !errdefs.IsNotFound(err) {
		t.Errorf("parent not in the namespace: %v", err)
	}
	_, err = m.sn.Prepare(ns("three"), "extract a", "", refer(a))
	wantExists(t, "first layer in the third namespace", err)
	_, err = m.sn.Prepare(ns("three"), "extract b", a, refer(b))
	wantExists(t, "second layer in the third namespace", err)
	mounts, err = m.sn.Prepare(ns("three"), "container", b)
	must(t, err)
	mounted(t, mounts, func(dir string) { wantFile(t, dir+"/from", b) })

	// Whoever unpacked it first may go.
	must(t, m.sn.Remove(ns("one"), b))
	must(t, m.sn.Remove(ns("one"), a))
	mounts, err = m.sn.Mounts(ns("three"), "container")
	must(t, err)
	mounted(t, mounts, func(dir string) { wantFile(t, dir+"/from", b) })
	must(t, m.sn.Remove(ns("three"), "container"))
	m.collect(t)
	s.wantNames(t)
	s.wantConsistent(t)
}

// TestWithRefAtOnce asks for one layer from 16 sides: all are told that it is
// there, and it is there once.
func TestWithRefAtOnce(t *testing.T) {
	needRoot(t)
	t.Parallel()
	s := serve(t, layers(t, twoLayers))
	sn := s.snapshotter()
	ctx := context.Background()
	for round := range 10 {
		backendA := ""
		for _, step := range []string{"a", "b"} {
			parent := ""
			if step == "b" {
				parent = s.only(t, id("a"), "")
				backendA = parent
			}
			var wg sync.WaitGroup
			start := make(chan struct{})
			for i := range 16 {
				wg.Go(func() {
					<-start
					_, err := sn.Prepare(ctx, fmt.Sprintf("ns%d/%d/extract %s", i%3, i, step), parent, refer(id(step)))
					wantExists(t, fmt.Sprintf("client %d, layer %s", i, step), err)
				})
			}
			close(start)
			wg.Wait()
		}
		if got := s.pairs(t); len(got) != 2 || got[[2]string{id("a"), ""}] != 1 || got[[2]string{id("b"), backendA}] != 1 {
			t.Errorf("round %d: %v", round, got)
		}
		must(t, sn.Remove(ctx, s.only(t, id("b"), backendA)))
		must(t, sn.Remove(ctx, backendA))
		must(t, s.cleanup())
	}
	s.wantConsistent(t)
}

// TestWithRefRefused: a hit does not skip the checks on the parent.
func TestWithRefRefused(t *testing.T) {
	needRoot(t)
	t.Parallel()
	s := serve(t, layers(t, twoLayers))
	_, err := s.prepare("active", "", nil)
	must(t, err)
	ref := map[string]string{snapshots.LabelSnapshotRef: id("a")}
	_, err = s.prepare("new", "missing", ref)
	wantCode(t, "hit on a missing parent", err, codes.NotFound)
	_, err = s.prepare("new", "active", ref)
	wantCode(t, "hit on an active parent", err, codes.InvalidArgument)
	s.wantNames(t, "active")
}

// TestForgedRef sends refs that are no digests. An image's author has no way to
// set this label, another client of the socket has.
func TestForgedRef(t *testing.T) {
	needRoot(t)
	t.Parallel()
	for _, share := range []string{"isolated", "node"} {
		s := serve(t, layers(t, twoLayers), withEnv("SPEEDY_LAYERS_SHARE="+share))
		good := id("a")
		forged := []string{
			"x", "not-a-digest", "sha256", "sha256:", "sha256:abc", ":", "::", "../../etc/passwd", "/etc/passwd", "sha256:../../../etc/passwd",
			"sha256:/etc/passwd", good + "\n", "\n" + good, " " + good, good + " ", good + "\x00", good + "a", good[:len(good)-1], strings.ToUpper(good),
			"SHA256:" + strings.Repeat("a", 64), "sha256:" + strings.Repeat("A", 64), "sha256:" + strings.Repeat("g", 64), "sha256:" + strings.Repeat("a", 60) + "/../",
			"sha512:" + strings.Repeat("a", 64), "md5:" + strings.Repeat("a", 32), "sha256-" + strings.Repeat("a", 64), "*", "%", "sha256:%", "' OR 1=1 --", "etc/hello",
			strings.Repeat("a", 4000), "sha256:" + strings.Repeat("a", 4000), strings.Repeat("../", 1300), "sha256:" + strings.Repeat("\u00e4", 32),
		}
		for _, ref := range []string{strings.Repeat("a", 32<<10), "sha256:" + strings.Repeat("a", 32<<10), strings.Repeat("../", 10000)} {
			_, err := s.prepare("too long", "", map[string]string{snapshots.LabelSnapshotRef: ref})
			wantCode(t, "a ref that is too long for a label", err, codes.InvalidArgument)
		}
		for i, ref := range forged {
			what := fmt.Sprintf("%s: ref %d, %.30q", share, i, ref)
			labels := map[string]string{snapshots.LabelSnapshotRef: ref}
			// Twice, with a commit between: the first must not become a hit for the second.
			for round := range 2 {
				key, to := fmt.Sprintf("active %d %d", i, round), fmt.Sprintf("committed %d %d", i, round)
				mounts, err := s.prepare(key, "", labels)
				if err != nil {
					t.Errorf("%s: %v", what, err)
					continue
				}
				if mounts[0].Type != "bind" || !slices.Equal(mounts[0].Options, []string{"rw", "rbind"}) {
					t.Errorf("%s: %v", what, mounts)
				}
				info, err := s.stat(key)
				must(t, err)
				if info.GetLabels()[snapshots.LabelSnapshotRef] != ref || info.GetKind() != snapshotsapi.Kind_ACTIVE {
					t.Errorf("%s: stored as %.200v", what, info)
				}
				write(t, upper(t, mounts)+"/file", "x")
				must(t, s.commit(to, key, "", labels))
			}
		}
		s.restart(t, unix.SIGTERM)
		want := []string{}
		for i := range forged {
			want = append(want, fmt.Sprintf("committed %d 0", i), fmt.Sprintf("committed %d 1", i))
		}
		s.wantNames(t, want...)
		for _, key := range want {
			must(t, s.remove(key))
		}
		// The real one is still a hit.
		_, err := s.prepare("real", "", map[string]string{snapshots.LabelSnapshotRef: good})
		wantCode(t, "a real ref", err, codes.AlreadyExists)
		must(t, s.remove(s.only(t, good, "")))
		must(t, s.cleanup())
		s.wantConsistent(t)
	}
}
