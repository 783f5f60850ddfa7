package conformance

import (
	"context"
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
)

// TestKeys uses names that are hostile to file systems, shells and databases.
// containerd sends keys of its clients as they are.
func TestKeys(t *testing.T) {
	needRoot(t)
	t.Parallel()
	s := serve(t)
	keys := []string{
		"plain", "with space", " ", "  two", "trailing ", "slash/inside", "/", "//", "/absolute/path", "..", "../..", "../../etc/passwd", ".", "./x",
		"new\nline", "\n", "tab\there", "carriage\r\n", "nul\x00a", "nul\x00b", "\x00", "\x7f\x1b[31m", "quote'", `quote"`, "`", "back\\slash", "%s%n%d",
		"'; DROP TABLE snapshots; --", "*", "?", "_", "%", "a%", "-rf", "--help", "$HOME", "$(id)", "\u00fc", "u\u0308", "\U0001f680", "\u202e", "\ufeff", "\ufffd",
		"Case", "case", "CASE", "extract-1-abcd sha256:00", "k8s.io/17/extract", "null", "0", "-1",
		strings.Repeat("k", 255), strings.Repeat("k", 256), strings.Repeat("k", 4096), strings.Repeat("p/", 2000),
		// With the longest prefix below, as long as a key may be; and one that differs in the last byte.
		strings.Repeat("K", maxKey-len("active ")), strings.Repeat("K", maxKey-len("active ")-1) + "L",
	}
	for i, key := range keys {
		short := fmt.Sprintf("key %d, %.40q", i, key)
		label := map[string]string{}
		if len(key)+len("as a label") <= maxLabel {
			label[key] = "as a label"
		}
		m, err := s.prepare("active "+key, "", label)
		if err != nil {
			t.Fatalf("%s: %v", short, err)
		}
		write(t, upper(t, m)+"/number", fmt.Sprint(i))
		again, err := s.mounts("active " + key)
		must(t, err)
		wantMounts(t, short, again, m)
		must(t, s.commit(key, "active "+key, "", label))
		info, err := s.stat(key)
		must(t, err)
		if info.GetName() != key || !maps.Equal(info.GetLabels(), label) {
			t.Errorf("%s came back as %.60q with labels %.60q", short, info.GetName(), info.GetLabels())
		}
		_, err = s.prepare("child "+key, key, nil)
		must(t, err)
	}
	s.restart(t, killed)
	if got := len(s.names(t)); got != 2*len(keys) {
		t.Errorf("%d snapshots, want %d: names fell together", got, 2*len(keys))
	}
	for i, key := range keys {
		info, err := s.stat("child " + key)
		must(t, err)
		if info.GetParent() != key {
			t.Errorf("key %d: parent %.60q", i, info.GetParent())
		}
		m, err := s.view("look "+key, key, nil)
		must(t, err)
		mounted(t, m, func(dir string) { wantFile(t, dir+"/number", fmt.Sprint(i)) })
		if len(key)+len("new") > maxLabel {
			continue
		}
		info, err = s.update(&snapshotsapi.Info{Name: key, Labels: map[string]string{key: "new"}}, "labels."+key)
		must(t, err)
		if info.GetLabels()[key] != "new" {
			t.Errorf("key %d: label not updated", i)
		}
	}
	for _, key := range keys {
		must(t, s.remove("look "+key))
		must(t, s.remove("child "+key))
		must(t, s.remove(key))
	}
	s.wantNames(t)
	must(t, s.cleanup())

	// Beyond the limit: a clear answer, and nothing happened.
	long := strings.Repeat("K", maxKey+1)
	_, err := s.prepare(long, "", nil)
	wantCode(t, "Prepare of a key that is too long", err, codes.InvalidArgument)
	_, err = s.prepare("short", "", nil)
	must(t, err)
	wantCode(t, "Commit to a name that is too long", s.commit(long, "short", "", nil), codes.InvalidArgument)
	s.wantNames(t, "short")
	s.wantConsistent(t)
}

// maxKey is what bolt takes as a key, and so what containerd can keep.
const maxKey = 32 << 10

// maxLabel is containerd's limit for a label's key and value together. The
// daemon has the same, so that what is stored can always be sent on.
const maxLabel = 4096

// TestLargeLabels stores as much as a label and a message may carry, and more.
func TestLargeLabels(t *testing.T) {
	needRoot(t)
	t.Parallel()
	s := family(t)
	full := map[string]string{"full": strings.Repeat("v", maxLabel-4), strings.Repeat("k", maxLabel-1): "v"}
	_, err := s.prepare("full", "", full)
	must(t, err)
	info, err := s.stat("full")
	must(t, err)
	if !maps.Equal(info.GetLabels(), full) {
		t.Errorf("labels of %d bytes came back wrong", maxLabel)
	}
	for what, labels := range map[string]map[string]string{
		"one byte too much": {"k": strings.Repeat("v", maxLabel)},
		"value of 32 KiB":   {"good": "1", "long": strings.Repeat("v", 32<<10)},
		"key of 32 KiB":     {"good": "1", strings.Repeat("k", 32<<10): "v"},
	} {
		_, err := s.prepare("new", "top", labels)
		wantCode(t, "Prepare, "+what, err, codes.InvalidArgument)
		_, err = s.view("new", "top", labels)
		wantCode(t, "View, "+what, err, codes.InvalidArgument)
		wantCode(t, "Commit, "+what, s.commit("new", "active", "", labels), codes.InvalidArgument)
		_, err = s.update(&snapshotsapi.Info{Name: "full", Labels: labels})
		wantCode(t, "Update, "+what, err, codes.InvalidArgument)
	}
	s.wantNames(t, append([]string{"full"}, familyNames...)...)
	info, err = s.stat("full")
	must(t, err)
	if !maps.Equal(info.GetLabels(), full) {
		t.Error("a refused Update changed labels")
	}

	// 10 MiB in one message, each label within containerd's limit of 4096 bytes.
	many := map[string]string{}
	for i := range 2560 {
		k := fmt.Sprintf("label-%05d", i)
		many[k] = strings.Repeat("x", maxLabel-len(k))
	}
	_, err = s.prepare("10 MiB", "", many)
	must(t, err)
	info, err = s.stat("10 MiB")
	must(t, err)
	if len(info.GetLabels()) != len(many) {
		t.Errorf("%d labels, want %d", len(info.GetLabels()), len(many))
	}
	_, err = s.update(&snapshotsapi.Info{Name: "full", Labels: many})
	must(t, err)
	all := append([]string{"full", "10 MiB"}, familyNames...)
	// Together they are more than one message may hold, and a List that fails
	// stops containerd's collector for good.
	s.wantNames(t, all...)
	if got, err := s.list("name==" + strings.Repeat("n", 10<<20)); status.Code(err) != codes.InvalidArgument && (err != nil || len(got) > 0) {
		t.Errorf("a filter of 10 MiB: %d snapshots, %v", len(got), err)
	}

	// Beyond the limit a call is refused, and the next one is served.
	many["last"] = strings.Repeat("x", 7<<20)
	conn, err := grpc.NewClient("unix://"+s.socket, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.MaxCallSendMsgSize(64<<20)))
	must(t, err)
	defer conn.Close()
	ctx, cancel := limit()
	defer cancel()
	if _, err = snapshotsapi.NewSnapshotsClient(conn).Prepare(ctx, &snapshotsapi.PrepareSnapshotRequest{
		Snapshotter: name, Key: "too much", Labels: many,
	}); err == nil {
		t.Error("a message beyond 16 MiB was taken")
	}
	s.wantNames(t, all...)
}

// rawCodec sends bytes as they are: Go's own encoder refuses what the test wants to send.
type rawCodec struct{}

func (rawCodec) Marshal(v any) ([]byte, error)      { return v.([]byte), nil }
func (rawCodec) Unmarshal(data []byte, v any) error { *v.(*[]byte) = data; return nil }
func (rawCodec) Name() string                       { return "proto" }

// TestNotUTF8 sends strings that proto3 does not allow, and bytes that are no message.
func TestNotUTF8(t *testing.T) {
	needRoot(t)
	t.Parallel()
	s := family(t)
	text := func(num protowire.Number, v string) []byte {
		return protowire.AppendString(protowire.AppendTag(nil, num, protowire.BytesType), v)
	}
	join := func(parts ...[]byte) []byte {
		var out []byte
		for _, p := range parts {
			out = append(out, p...)
		}
		return out
	}
	bad := "bad \xff\xfe \xc3("
	label := func(k, v string) []byte { return text(4, string(join(text(1, k), text(2, v)))) }
	head := text(1, name)
	for _, c := range []struct {
		what, method string
		body         []byte
	}{
		{"key", "Prepare", join(head, text(2, bad))},
		{"parent", "Prepare", join(head, text(2, "new"), text(3, bad))},
		{"label key", "Prepare", join(head, text(2, "new"), label(bad, "v"))},
		{"label value", "Prepare", join(head, text(2, "new"), label("k", bad))},
		{"snapshotter", "Prepare", join(text(1, bad), text(2, "new"))},
		{"key", "View", join(head, text(2, bad))},
		{"key", "Mounts", join(head, text(2, bad))},
		{"name", "Commit", join(head, text(2, bad), text(3, "active"))},
		{"key", "Commit", join(head, text(2, "new"), text(3, bad))},
		{"label value", "Commit", join(head, text(2, "new"), text(3, "active"), label("k", bad))},
		{"parent", "Commit", join(head, text(2, "new"), text(3, "bare"), text(5, bad))},
		{"key", "Remove", join(head, text(2, bad))},
		{"key", "Stat", join(head, text(2, bad))},
		{"key", "Usage", join(head, text(2, bad))},
		{"name", "Update", join(head, text(2, string(text(1, bad))))},
		{"path", "Update", join(head, text(2, string(text(1, "base"))), text(3, string(text(1, bad))))},
		{"snapshotter", "Cleanup", text(1, bad)},
		{"cut short", "Prepare", join(head, text(2, "new"))[:8]},
		{"wrong wire type", "Prepare", join(head, protowire.AppendVarint(protowire.AppendTag(nil, 2, protowire.VarintType), 1))},
		{"no message", "Remove", []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}},
	} {
		var reply []byte
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		err := s.conn.Invoke(ctx, "/containerd.services.snapshots.v1.Snapshots/"+c.method, c.body, &reply, grpc.ForceCodec(rawCodec{}))
		cancel()
		if err == nil {
			t.Errorf("%s with bad %s was taken", c.method, c.what)
		}
	}
	s.wantNames(t, familyNames...)

	// A field that is not known yet is not an error.
	var reply []byte
	body := join(head, text(2, "base"), text(99, "from the future"))
	must(t, s.conn.Invoke(context.Background(), "/containerd.services.snapshots.v1.Snapshots/Stat", body, &reply, grpc.ForceCodec(rawCodec{})))
	s.wantConsistent(t)
}
